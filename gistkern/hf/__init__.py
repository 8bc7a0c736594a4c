"""Hugging Face transformers: the only part of gistkern, with the cache, that imports it."""
