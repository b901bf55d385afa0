"""Which rows, when: pure functions with random access; nothing in this folder reads a row."""
