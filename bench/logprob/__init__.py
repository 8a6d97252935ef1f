"""Benches of ``hotloop.logprob``."""
