"""Benchmarks as commands: ratios from one interleaved run, medians, every precision named."""
