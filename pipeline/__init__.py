"""From image-caption shards to a Lance table, on Apache Beam."""
