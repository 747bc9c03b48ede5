"""Captioned shapes to try everything on, and the checker that reads them back."""
