"""Loggers that another process can import."""

from __future__ import annotations

import os


class Quiet:
    """Takes everything, keeps nothing."""

    def open(self, info):
        pass

    def log(self, row):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class Failing(Quiet):
    """Fails where it is told to."""

    def __init__(self, method):
        self.method = method
        self.fail_at("make")

    def fail_at(self, method):
        if method == self.method:
            raise ValueError(f"{method} failed")

    def open(self, info):
        self.fail_at("open")

    def log(self, row):
        self.fail_at("log")

    def close(self):
        self.fail_at("close")


class Unpicklable(Quiet):
    """Raises what cannot be pickled."""

    def log(self, row):
        class NoTravelError(Exception):
            pass

        raise NoTravelError("cannot travel")


class Dying(Quiet):
    """Takes its process with it."""

    def log(self, row):
        os._exit(7)


class Chatty(Quiet):
    """Prints."""

    def log(self, row):
        print("row", row.step, flush=True)
