"""Contractions by Pallas kernels, for accelerators."""
