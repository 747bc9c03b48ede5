"""Arithmetic only: the coordinates of rows, the vectors that are stored, the queries that are compared with them."""
