"""Apache Beam transforms that stand on their own."""
