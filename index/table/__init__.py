"""What is on disk: columns, metadata, versions, locks."""
