"""Image and text encoders: diffusers autoencoders and text models, from a folder or the hub."""
