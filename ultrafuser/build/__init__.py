"""Builds and changes folders of fused models."""
