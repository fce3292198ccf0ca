"""Find in a server's log why it died."""

import itertools
import re

ENTRY = re.compile(r"^\[\d{4}-\d\d-\d\d ", re.MULTILINE)
HARMLESS = ("post-warmup freeze_gc failed", "Ignore import error")
"""Entries that SGLang prints, with a traceback, on the way to a healthy server."""
FATAL = "hit an exception: Traceback"
"""With this a process of the server says why it will end them all, by SIGKILL where it is quick."""
EXCEPTION = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Warning)\b.*")


def says_why(log: str) -> bool:
    """Whether the server ended by an exception of its own, so that `first_cause` is why, whatever signal it died of."""
    return FATAL in log


def first_cause(log: str) -> str:
    """The exception at the root of the first traceback in `log`, in a few lines; else the last line that is there."""
    starts = [0, *(match.start() for match in ENTRY.finditer(log)), len(log)]
    for start, end in itertools.pairwise(starts):
        entry = log[start:end]
        if "Traceback (most recent call last):" in entry and not any(text in entry for text in HARMLESS):
            cause = _root_exception(entry.split("Traceback (most recent call last):", 1)[1])
            if cause:
                return cause
    lines = [line.strip() for line in log.splitlines() if line.strip() and not any(text in line for text in HARMLESS)]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["it printed nothing"])[0 if errors else -1]


def _root_exception(after_header: str) -> str:
    lines = after_header.splitlines()
    for number, line in enumerate(lines):
        if EXCEPTION.match(line):
            rest = []
            for following in lines[number + 1 : number + 4]:
                if not following.strip() or following.startswith(("During handling", "The above exception", "[")):
                    break
                rest.append(following)
            return "\n".join([line, *rest])
    return ""
