"""The error memory of ReLoop2: exact, and as a sketch."""
