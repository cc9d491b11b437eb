"""Between Hugging Face layouts and this model: one declarative table, read in both directions."""
