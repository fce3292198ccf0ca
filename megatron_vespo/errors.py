"""The two kinds of failure that a user sees."""

from pathlib import Path


class ConfigError(Exception):
    """A mistake of the user's: the message names the key or the file and what to do. Commands exit with 2."""


class RunError(Exception):
    """A run that could not go on. The message is its first cause, and the last thing that a command prints."""

    exit_code = 1
    details = ""
    """Stack traces and the like, for the run's error.txt."""


def looked_in(path: str | Path) -> str:
    """For messages about a path that leads nowhere: the folder that a relative one was taken from; else nothing."""
    return "" if Path(path).is_absolute() else f" (looked for from {Path.cwd()}, where the command was started)"
