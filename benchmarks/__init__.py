"""Benchmarks: speed beside public peers, the cost of packing, and what kills and flipped bits do to a run."""
