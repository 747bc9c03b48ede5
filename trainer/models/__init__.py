"""Networks, as diffusers models."""
