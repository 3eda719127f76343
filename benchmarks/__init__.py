"""Benchmarks: `make bench` runs them all; each can be run alone as python -m benchmarks.<name>."""
