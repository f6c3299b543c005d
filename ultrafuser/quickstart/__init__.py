"""From nothing to a fused model in minutes: a toy on text that every machine has, and specialists of a real base."""
