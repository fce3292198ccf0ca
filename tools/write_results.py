"""Write the figures of docs/results.md, and its images, from results/*.json: python tools/write_results.py

A grid that was run has a section, and in it a part between two markers, which this tool writes; everything else on the page
is written by hand and stays. A grid without results has no section.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_vespo.observability.comparison_charts import PALETTE
from megatron_vespo.observability.comparison_grid import grid_table, last_of, named

REPOSITORY = Path(__file__).parents[1]
TARGET = REPOSITORY / "docs" / "results.md"
RESULTS = REPOSITORY / "results"
IMAGES = REPOSITORY / "docs" / "images"
ABREAST = 2
FEW = 6
"""Up to so many variants, the table of all is open."""


@dataclass(frozen=True)
class Section:
    """`name`: of the grid and of its file of results."""

    name: str
    heading: str
    question: str
    """Under the heading of a new section; to be rewritten by hand at will."""
    share_kept: bool = False
    """Also say what share of the first column's accuracy the last column has."""


SECTIONS = (
    Section("rates", "Learning rates", "Which learning rate suits each method?"),
    Section("staleness", "Staleness", "Does learning hold when the data is old?", share_kept=True),
    Section("staleness_more", "On-policy, and two more methods", "The same at N = 1, and for CISPO and REINFORCE."),
    Section(
        "compare",
        "VESPO and GRPO at staleness 64",
        "How much of the difference is the kernel's, how much the aggregation's?",
    ),
    Section(
        "kernel_rates", "Learning rates of VESPO's ablations", "Which learning rate suits each ablation of the kernel?"
    ),
    Section("kernels", "The kernel", "Which parts of the kernel matter?"),
    Section("mismatch", "A mismatched engine", "What helps when engine and trainer disagree: replay, or TIS?"),
    Section("routing_replay", "Routing replay", "What does replay change for two objectives and two engines?"),
    Section("router_noise", "Noise on the engine's router", "How wrong may an engine route?"),
    Section("old_policy", "The old policy", "Against whose log-probs should the weight be taken?"),
    Section("thresholds", "Asynchronous training", "Does learning hold when sampling and training run side by side?"),
    Section("aggregation", "Aggregation", "What should the sum over tokens be divided by?"),
    Section("long_sums", "Long sums", "Why does training collapse on long responses at a large rate?"),
)
DETAILS = (
    ("accuracy_before", "before", 3),
    ("accuracy_final", "after", 3),
    ("accuracy_best", "best", 3),
    ("log_weight_std", "std of log W", 2),
    ("ess", "effective sample size", 2),
    ("response_length", "length", 1),
    ("wall_seconds", "seconds", 0),
)


def begin(name: str) -> str:
    return f"<!-- {name}: written by tools/write_results.py from here -->"


def end(name: str) -> str:
    return f"<!-- {name}: to here -->"


def figures(section: Section, data: dict[str, Any]) -> str:
    """What stands between the markers."""
    parts = [origin(section.name, data)]
    if curves_by_point(data["variants"]):
        parts.append(f"![Held-out accuracy over steps, {section.heading}](images/{image(section.name)})")
    if found := "\n".join(by_value(section, data["variants"])):
        parts.append(found)
    table = "\n".join(by_variant(data["variants"]))
    if found and len(data["variants"]) > FEW:
        table = f"<details markdown>\n<summary>Every variant</summary>\n\n{table}\n\n</details>"
    parts.append(table)
    return "\n\n".join([begin(section.name), *parts, end(section.name)])


def origin(name: str, data: dict[str, Any]) -> str:
    seeds = data["seeds"]
    told = [
        f"`{data['command']}`",
        data["date"],
        data["machine"],
        *([f"commit {data['commit']}"] if data["commit"] else []),
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        f"{data['finished']} of {data['planned']} runs finished",
        f"{data['wall_hours']:.1f} hours one after the other ({data['core_hours']:.1f} core hours)",
    ]
    return f"{'; '.join(told)}. Everything is in [results/{name}.json](../results/{name}.json)."


def by_value(section: Section, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Accuracy after training, methods down and the grid's last axis across; nothing where there is no such table."""
    table = grid_table(rows)
    if table is None:
        return
    kept = [f"{table.columns[-1]} / {table.columns[0]}"] if section.share_kept else []
    yield f"Accuracy after training, by {last_of(table.axis)}: mean over seeds (least to largest).\n"
    yield "| | " + " | ".join([*table.columns, *kept]) + " |"
    yield "|---|" + "---:|" * (len(table.columns) + len(kept))
    for name, at in table.lines:
        cells = [cell(row) if row is not None else "" for row in at]
        if kept:
            first, last = (row["accuracy_final"]["mean"] if row is not None else None for row in (at[0], at[-1]))
            cells.append(f"{last / first:.2f}" if first and last else "")
        yield f"| {name} | " + " | ".join(cells) + " |"


def cell(row: Mapping[str, Any]) -> str:
    collapsed = f", {row['collapsed']} of {row['seeds']} collapsed" if row["collapsed"] else ""
    return spread(row["accuracy_final"], 3) + collapsed


def by_variant(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | runs | " + " | ".join(heading for _, heading, _ in DETAILS) + " | collapsed |"
    yield "|---|---:|" + "---:|" * len(DETAILS) + "---:|"
    for row in rows:
        cells = [spread(row[name], digits) for name, _, digits in DETAILS]
        runs = str(row["seeds"]) if row["finished"] == row["seeds"] else f"{row['finished']} of {row['seeds']}"
        yield f"| {row['name']} | {runs} | " + " | ".join(cells) + f" | {row['collapsed']} |"


def image(name: str) -> str:
    return f"results_{name}.svg"


Curve = dict[float, list[float]]
"""Accuracies of all runs, by step."""


def curves_by_point(rows: list[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Of each method at each point of the grid; empty where the runs have no curves."""
    found: dict[str, dict[str, Curve]] = {}
    for row in rows:
        curve: Curve = {}
        for step, accuracy in (point for run in row["runs"] for point in run.get("accuracy_over_steps", [])):
            curve.setdefault(step, []).append(accuracy)
        if curve:
            found.setdefault(named(list(row["point"].items())), {})[row["method"]] = dict(sorted(curve.items()))
    return found


def draw(rows: list[dict[str, Any]]) -> bytes | None:
    """Learning curves as SVG, a panel for each point of the grid: mean over seeds, band from the least to the largest."""
    panels = curves_by_point(rows)
    if not panels:
        return None
    colours = dict(zip(dict.fromkeys(row["method"] for row in rows), (light for light, _ in PALETTE), strict=False))
    across = min(len(panels), ABREAST)
    down = -(-len(panels) // ABREAST)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 10}):
        figure = Figure(figsize=(0.8 + 2.7 * across, 0.5 + 2.2 * down), layout="constrained")
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            for method, curve in curves.items():
                steps, values = list(curve), list(curve.values())
                axis.fill_between(
                    steps, [min(v) for v in values], [max(v) for v in values], color=colours[method], alpha=0.15, lw=0
                )
                axis.plot(steps, [sum(v) / len(v) for v in values], color=colours[method], lw=1.6)
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.supxlabel("optimizer steps", fontsize=10)
        figure.supylabel("held-out accuracy", fontsize=10)
        lines = [Line2D([], [], color=colour) for colour in colours.values()]
        figure.legend(lines, list(colours), loc="outside upper center", ncols=len(colours), frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def images(results: Path) -> dict[str, bytes]:
    """Of all grids in `results`, by file name."""
    found = {}
    for section in SECTIONS:
        if (file := results / f"{section.name}.json").exists():
            drawn = draw(json.loads(file.read_text())["variants"])
            found |= {image(section.name): drawn} if drawn is not None else {}
    return found


def spread(found: dict[str, Any], digits: int) -> str:
    if not found["n"]:
        return ""
    mean, low, high = (f"{found[name]:,.{digits}f}" for name in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def page(text: str, results: Path) -> str:
    """`text` with the figures of all grids in `results`; sections that are new come in the order of SECTIONS.

    Raises:
        ValueError: a section's results are gone, or a marker.
    """
    head, *chunks = text.split("\n## ")
    known = {
        section.name: f"## {chunk.rstrip()}" for chunk in chunks for section in SECTIONS if begin(section.name) in chunk
    }
    others = [f"## {chunk.rstrip()}" for chunk in chunks if not any(begin(name) in chunk for name in known)]
    for section in SECTIONS:
        file = results / f"{section.name}.json"
        if not file.exists():
            if section.name in known:
                raise ValueError(f"docs/results.md has a section of {section.name}, but there is no {file}")
            continue
        written = figures(section, json.loads(file.read_text()))
        if section.name not in known:
            known[section.name] = f"## {section.heading}\n\n{section.question}\n\n{written}"
            continue
        before, _, after = known[section.name].partition(begin(section.name))
        _, marker, after = after.partition(end(section.name))
        if not marker:
            raise ValueError(f"docs/results.md: '{end(section.name)}' is missing")
        known[section.name] = before + written + after
    written = [known[section.name] for section in SECTIONS if section.name in known]
    return "\n\n".join([head.rstrip(), *written, *others]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(TARGET.read_text(), RESULTS))
    for name, drawn in images(RESULTS).items():
        (IMAGES / name).write_bytes(drawn)
    print(TARGET)
