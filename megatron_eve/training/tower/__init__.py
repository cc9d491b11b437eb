"""Training of a vision tower alone."""
