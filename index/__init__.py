"""The table: what a row is, how rows are compared, how they are found."""
