"""Comparisons of einfall with its peers. `python benchmarks/cpu.py` runs the short ones; docs/benchmarks.md explains them."""
