"""Targets drawn ahead: the pairs of all training steps, retrieved once."""
