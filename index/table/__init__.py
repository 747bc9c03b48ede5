"""What is on disk: columns and metadata, object stores, the lock of a table, opening, reading and committing."""
