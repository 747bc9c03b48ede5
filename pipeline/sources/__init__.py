"""Read image-caption samples from tars, parquet files, folders, saved datasets and the hub."""
