"""EVE v2's folders in Hugging Face layout."""
