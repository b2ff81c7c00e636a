"""neuronguard: everything that looks inside a model. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
