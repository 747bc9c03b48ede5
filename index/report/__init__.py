"""What is measured of a table and its index."""
