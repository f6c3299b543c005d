"""Trains gates and fused models from recipes."""
