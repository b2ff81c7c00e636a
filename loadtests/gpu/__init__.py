"""Checks of the guard on a machine with an NVIDIA GPU: ``python -m loadtests.gpu.run``."""
