"""Pictures of a fused model: who speaks, how it compares, how it was trained."""
