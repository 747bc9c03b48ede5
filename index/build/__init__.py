"""What `build-index` decides: how the table is laid out, and which index serves it."""
