"""Is fusing worth it? What is measured, and against which baselines."""
