"""Benches of ``hotloop.table``."""
