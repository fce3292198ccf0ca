"""Findings for people and for scripts."""

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from megatron_vespo.doctor.finding import Finding, is_fit

DETAILS = ("missing", "cost", "mend")


def as_json(findings: Sequence[Finding]) -> str:
    """{"fit": no check failed, "findings": [{check, status, found, missing, cost, mend}]}."""
    return json.dumps({"fit": is_fit(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def as_text(findings: Sequence[Finding]) -> str:
    """A table: status, check, what was found; below each that is not in order what is missing, its cost, what mends it."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    name = max((len(finding.check) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        start = f"{finding.status:<8} {finding.check:<{name}}  "
        lines += _wrapped(finding.found, start, width)
        for detail in DETAILS:
            if text := getattr(finding, detail):
                lines += _wrapped(text, f"{' ' * (name + 11)}{detail + ':':<9}", width)
    return "\n".join([*lines, "", summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    counted = ", ".join(f"{counts[status]} {status}" for status in ("ok", "note", "warning", "failed"))
    verdict = "a run can start here" if is_fit(findings) else "a run will not work here until what failed is mended"
    return f"{counted}: {verdict}"


def _wrapped(text: str, start: str, width: int) -> list[str]:
    lines: list[str] = []
    for number, line in enumerate(text.splitlines() or [""]):
        indent = start if number == 0 else " " * len(start)
        lines += textwrap.wrap(
            line,
            width,
            initial_indent=indent,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [indent.rstrip()]
    return lines
