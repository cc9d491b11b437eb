"""Vision towers that several families share."""
