"""A metric for the `evaluate` library."""
