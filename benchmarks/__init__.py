"""Benchmarks: each file opens with its question, its baseline and its unit."""
