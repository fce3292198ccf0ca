import re
from pathlib import Path

from small_run import checkpoint_row, evaluation_row, rollout_row, step_row, sync_row

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, set[str]]:
    """Names in the first column of each kind's table."""
    sections = re.split(r"^## (\w+)", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    first_columns = {}
    for kind, text in zip(sections[::2], sections[1::2], strict=True):
        cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
        first_columns[kind] = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return first_columns


def test_every_metric_of_a_row_is_documented_and_nothing_else():
    assert documented() == {
        "rollout": set(rollout_row(0)),
        "step": set(step_row(0, 0)) | set(step_row(0, 1)),
        "sync": set(sync_row(0)),
        "evaluation": set(evaluation_row("before", 0.5)),
        "checkpoint": set(checkpoint_row(5)),
        "phase": {"phase", "time/seconds"},
    }
