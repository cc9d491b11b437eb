"""The family VILA (arXiv 2312.07533): a vision tower and a projector in front of the decoder."""
