"""The cache of gist rows: what a patched model writes, a file keeps and a question reads (docs/concepts/cache.md)."""
