"""Train a small model under many parallel layouts and compare each with one process, tensor by tensor.

python tools/check_parallelism.py --world-size 4 --out parity.json
python tools/check_parallelism.py --layouts tp=2,ep=2,etp=1 cp=2,pp=2,recompute=full
python tools/check_parallelism.py --replay --out replay.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from megatron_vespo.config import ConfigError
from megatron_vespo.parity.case import MODELS, build_case
from megatron_vespo.parity.check import Finding, ParityCheck
from megatron_vespo.parity.compare import GRADIENT_TOLERANCE, LOSS_TOLERANCE, METRIC_TOLERANCE, UPDATE_TOLERANCE, Worst
from megatron_vespo.parity.layouts import matrix, parse_layout
from megatron_vespo.parity.pool import RankPool
from megatron_vespo.parity.worker import PlantedError

TABLE_WIDTH = 150


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    console = Console(width=max(console.width, TABLE_WIDTH))
    try:
        layouts = [parse_layout(text) for text in arguments.layouts] or matrix(arguments.world_size)
        ranks = max(layout.policy.ranks for layout in layouts)
        with tempfile.TemporaryDirectory() as folder, RankPool(ranks) as pool:
            case = build_case(Path(folder) / "model", arguments.model, arguments.seed)
            check = ParityCheck(pool, case.with_routes() if arguments.replay else case)
            findings = []
            for finding in check.findings(layouts, arguments.plant):
                findings.append(finding)
                console.print(f"[{len(findings)}/{len(layouts)}] {line_of(finding)}", highlight=False, markup=False)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(table_of(findings))
    if arguments.out:
        document = {"model": arguments.model, "findings": [finding.as_json() for finding in findings]}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    off = [finding for finding in findings if finding.verdict != "equal"]
    console.print(f"{len(findings) - len(off)} of {len(findings)} layouts give the numbers of one process")
    return 1 if off else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--world-size", type=int, default=4, help="run the layouts of the matrix with at most so many ranks"
    )
    parser.add_argument("--layouts", nargs="+", default=[], metavar="LAYOUT", help="these instead of the matrix")
    parser.add_argument("--model", choices=sorted(MODELS), default="moe")
    parser.add_argument("--seed", type=int, default=0, help="of weights and trajectories")
    parser.add_argument("--replay", action="store_true", help="replay recorded routes, and compare with them too")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument(
        "--plant",
        choices=get_args(PlantedError),
        default="none",
        help="leave one gradient reduction out, to see that the check fails",
    )
    return parser.parse_args()


def line_of(finding: Finding) -> str:
    return f"{finding.layout.name}: {finding.verdict} ({finding.seconds:.1f} s){f': {finding.error}' if finding.error else ''}"


def table_of(findings: list[Finding]) -> Table:
    table = Table(title="Largest relative difference from one process", title_justify="left")
    columns = (
        "layout",
        "ranks",
        "verdict",
        "loss",
        "gradient norm",
        "metrics",
        "gradient",
        "update",
        "routes",
        "not replayed",
        "where",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("layout", "verdict", "where") else "right")
    for finding in findings:
        found = finding.comparison
        cells = [finding.layout.name, str(finding.layout.policy.ranks), finding.verdict]
        if found:
            worst = (found.loss, found.gradient_norm, found.metrics, found.gradient, found.update)
            cells += [f"{part.value:.1e}" for part in worst] + [str(found.routes_changed), str(found.not_replayed)]
            cells.append("" if finding.verdict == "equal" else first_offence(*worst))
        table.add_row(*cells, style=None if finding.verdict == "equal" else "bold red")
    return table


def first_offence(loss: Worst, norm: Worst, metrics: Worst, gradient: Worst, update: Worst) -> str:
    limits = {"gradient": (gradient, GRADIENT_TOLERANCE), "update": (update, UPDATE_TOLERANCE)}
    limits |= {"metrics": (metrics, METRIC_TOLERANCE)}
    limits |= {"loss": (loss, LOSS_TOLERANCE), "gradient norm": (norm, LOSS_TOLERANCE)}
    return next((f"{name}: {worst.where}" for name, (worst, limit) in limits.items() if worst.value > limit), "")


if __name__ == "__main__":
    sys.exit(main())
