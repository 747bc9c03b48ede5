"""Image-caption sources: list their shards, count and read the samples of a shard.

A shard is the unit of work, named by a string that means the same data on every machine that can reach it:

    path/00000.tar  .tar.gz  .tgz   WebDataset / img2dataset                                        tar.py
    path/00000.parquet              rows with image bytes                                           parquet.py
    FOLDER#0-1000                   images with captions in .txt, .json or metadata.csv files       folder.py
    FOLDER/train#0-1000             a dataset written by Hugging Face's `save_to_disk`              saved.py
    hf:NAME?split=train&shard=0/3   a dataset of the Hugging Face hub, streamed                     hub.py

All but the last may be at any fsspec URI. listing.py finds the shards of a source, read.py calls the reader of a shard,
sample.py is what every reader yields; columns.py and ranges.py are shared by readers.
"""
