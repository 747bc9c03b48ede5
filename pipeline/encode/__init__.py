"""Encode the shards of a source into a table."""
