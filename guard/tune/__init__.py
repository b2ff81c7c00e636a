"""Tune a model by its safety units, keep them while it is tuned for something else, or train a donor."""
