"""What is measured of a table and its index, and the report of it."""
