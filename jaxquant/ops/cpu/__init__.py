"""Forms of contractions that a CPU is faster by; every other platform has the plain ones."""
