"""Benches of ``hotloop.decode``."""
