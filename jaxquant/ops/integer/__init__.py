"""Contractions whose operands and results are integers on calibrated grids."""
