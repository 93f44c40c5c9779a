"""Benchmarks of Headrace, shipped with it: each measures beside its peers and a control."""
