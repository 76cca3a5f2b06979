"""Contractions by kernels of our own, for accelerators."""
