"""A toy model family: what `docs/adding_a_model_family.md` walks through."""
