"""Processes and what they share."""
