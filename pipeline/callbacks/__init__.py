"""Callbacks: the events they are told of, who tells them, and those that come with the library."""
