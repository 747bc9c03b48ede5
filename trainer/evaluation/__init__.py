"""Evaluation of trained runs: samples for held-out captions, metrics, and references of known quality."""
