"""Rows exist: a URI or an opened dataset enters; rows, a schema, reads and a fingerprint leave."""
