"""What a network is trained for and how it is sampled: the coalescer and its rivals."""
