"""From the table to weights to images."""
