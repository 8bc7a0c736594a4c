"""The pictures of the documentation, drawn from layouts and from committed reports."""
