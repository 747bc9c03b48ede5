"""Encode image-caption data into an indexed Lance table, on Apache Beam."""
