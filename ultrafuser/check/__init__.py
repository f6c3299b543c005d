"""Whether models fit together, told from what there is beside their weights."""
