"""What ends a verb with one line on stderr."""

from __future__ import annotations


class Failure(Exception):
    """The engine or the server failed, through no fault of the command line: exit code 1."""
