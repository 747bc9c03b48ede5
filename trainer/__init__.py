"""Train networks on the pairs of a table, sample images from them, and evaluate them."""
