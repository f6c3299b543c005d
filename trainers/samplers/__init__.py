"""All samplers by the name that settings give."""
