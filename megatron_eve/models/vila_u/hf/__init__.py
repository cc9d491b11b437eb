"""VILA-U's folders in Hugging Face layout. Nothing of this package is imported by files that an export copies."""
