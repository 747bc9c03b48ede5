"""What `trainer evaluate` and `trainer compare` measure: a run's answers beside those that are known as good or bad."""
