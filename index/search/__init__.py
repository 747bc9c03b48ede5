"""Nearest-neighbor search over the training rows."""
