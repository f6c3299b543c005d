"""Judges from metadata whether models fit together."""
