"""What `pipeline build-index` decides."""
