"""Programs that use hotloop from end to end."""
