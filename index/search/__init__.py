"""Nearest-neighbor search over the training rows, approximate and exact."""
