"""Train image and text autoencoders on a source's own images and captions."""
