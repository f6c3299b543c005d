"""Compresses full models that were tuned from one base into LoRA specialists of it."""
