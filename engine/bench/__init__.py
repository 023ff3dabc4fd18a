"""Benchmarks: what `recall bench` runs. Each prints ratios from one run, repetitions alternating, with their spread."""
