"""The tools around the model: command line, quickstart, evaluation."""
