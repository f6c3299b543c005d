"""Instruction data for the domains that are fused: made with a teacher, taken in, cleaned and looked at."""
