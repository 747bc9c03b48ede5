"""Encode image-caption shards into a table: run, plan, job, graph, shard, checkpoints, monitor, dedup."""
