"""Threads and what they hand each other."""
