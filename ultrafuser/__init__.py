"""The tools around the model: command line, quickstart, documents' tables."""
