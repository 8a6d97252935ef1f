"""Benches of the shared loops."""
