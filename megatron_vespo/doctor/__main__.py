"""`python -m megatron_vespo.doctor`: the same as `megatron-vespo doctor`, for an environment where that does not start."""

import argparse
import sys
from pathlib import Path

from megatron_vespo.doctor import Options, as_json, as_text, examine, is_fit


def main() -> int:
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m megatron_vespo.doctor", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--shm-gb", type=float, default=defaults.shm_gb)
    parser.add_argument("--disk-gb", type=float, default=defaults.disk_gb)
    parser.add_argument("--import-seconds", type=float, default=defaults.import_seconds)
    given = parser.parse_args()
    options = Options(
        given.config, tuple(given.overrides), given.lock, given.shm_gb, given.disk_gb, given.import_seconds
    )
    findings = examine(options)
    print(as_json(findings) if given.json else as_text(findings))
    return 0 if is_fit(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
