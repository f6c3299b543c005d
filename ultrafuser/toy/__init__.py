"""Small models on text that every machine has."""
