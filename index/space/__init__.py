"""Arithmetic only: what is compared with what."""
