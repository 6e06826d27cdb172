"""Benchmarks: each is a module that prints a table and writes JSON with its environment."""
