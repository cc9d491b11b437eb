"""Texts to token ids and labels: tokenizers, chat templates, documents."""
