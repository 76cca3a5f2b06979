"""Forms of contractions that are faster on a CPU; other platforms use the plain ones."""
