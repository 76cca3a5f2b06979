"""The benchmark suite: cases, formats, peers, and what is measured of each."""
