"""hotloop inside other libraries. Each module needs its library; importing one changes nothing outside it."""
