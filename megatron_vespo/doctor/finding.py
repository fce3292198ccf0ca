"""What one check came to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        status: "ok"; "note": absent, and nothing here needs it; "warning": runs, and costs something; "failed": a run
            will not start, or not do what it says.
        found: what there is.
        missing: what there should be instead.
        cost: what its absence costs.
        mend: a command, or what to ask of whoever owns the machine.
    """

    check: str
    status: Status
    found: str
    missing: str = ""
    cost: str = ""
    mend: str = ""


def is_fit(findings: Iterable[Finding]) -> bool:
    """No check failed; notes and warnings don't count."""
    return all(finding.status != "failed" for finding in findings)
