"""Train small image and text autoencoders on a source's own samples."""
