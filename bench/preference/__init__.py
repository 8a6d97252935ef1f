"""Benches of ``hotloop.preference``."""
