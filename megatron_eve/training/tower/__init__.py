"""Training of a vision tower that makes codes of pictures, and pictures of codes."""
