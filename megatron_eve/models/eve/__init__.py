"""What EVE puts before and beside the decoder: the patch embedding layer and its projector."""
