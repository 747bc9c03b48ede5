"""One file per kind of source; `pipeline.sources` is the door to all of them."""
