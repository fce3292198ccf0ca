"""summary.json: what a run came to, for people and scripts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.observability.sinks import plain, strict_json


def write_summary(run_dir: str | Path, values: Mapping[str, Any]) -> Path:
    """Write run_dir/summary.json: keys sorted, indent 2, replaced in one move so that no reader sees half of it.

    A number that is not finite becomes null and is named in `not_finite`, as in metrics.jsonl.

    Raises:
        TypeError: a value is not a scalar.
    """
    path = Path(run_dir) / "summary.json"
    scalars = {name: plain(name, value) for name, value in values.items()}
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(
        json.dumps(strict_json(scalars), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(temporary, path)
    return path
