"""Sample order, packing and loading: which samples a step takes, in which order and in which packs."""
