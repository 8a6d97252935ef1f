"""Collisionless dynamic embedding tables."""
