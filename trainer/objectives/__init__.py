"""Objectives: what a network is trained for and how it is sampled. The coalescer and its rivals."""
