"""report.html: one self-contained page about a run, written from the files in its folder."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from megatron_vespo.observability.charts import percent, short
from megatron_vespo.observability.findings import findings
from megatron_vespo.observability.kernel_chart import kernel
from megatron_vespo.observability.pages import shown, write_page
from megatron_vespo.observability.report_charts import CORRECTION, COST, LEARNING, Maker
from megatron_vespo.observability.routing_charts import ROUTING
from megatron_vespo.observability.run_folder import FILES, MISMATCH_KINDS, RunFolder, column, mean, read_run, rhythm
from megatron_vespo.observability.time_charts import time_per_batch, time_total

ROUTES_FOLDER = "routing"


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from the run's own files; an unfinished run gets a report of what there is.

    The page loads nothing: styles, script and charts are inside it. Text that a model or a user wrote is escaped.

    Raises:
        ConfigError: `run_dir` is not the folder of a run, or a file in it cannot be read.
    """
    run = read_run(run_dir)
    return write_page(
        run.path / "report.html",
        "report.html",
        title=run.path.resolve().name,
        subtitle=_subtitle(run),
        hero=_hero(run),
        tiles=_tiles(run),
        unfinished=_unfinished(run),
        findings=findings(run),
        sections=_sections(run),
        samples=_sample_pairs(run),
        config=run.config_text,
        files=_files(run),
        commands=_commands(run),
    )


def _sections(run: RunFolder) -> list[dict[str, Any]]:
    def make(makers: Sequence[Maker]) -> list[dict[str, Any]]:
        return shown(maker(run) for maker in makers)

    sections = [
        {"id": "learning", "title": "Learning", "figures": make(LEARNING)},
        {"id": "correction", "title": "Off-policy correction", "figures": make((kernel, *CORRECTION))},
        {"id": "routing", "title": "Routing", "figures": make(ROUTING)},
        {"id": "cost", "title": "Time and optimizer", "figures": make((time_per_batch, time_total, *COST))},
    ]
    return [section for section in sections if section["figures"]]


def _subtitle(run: RunFolder) -> str:
    parts = []
    tasks = [
        source.get("task") or source.get("path") or source.get("target") for source in run.setting("data.sources", [])
    ]
    if any(tasks):
        parts.append(" + ".join(str(task) for task in tasks if task))
    if (model := run.setting("model.path")) is not None:
        parts.append(str(model))
    if (kernel_name := run.setting("algorithm.objective.kernel.name")) is not None:
        parts.append(", ".join(part for part in (kernel_name, rhythm(run)) if part))
    if (seed := run.setting("seed")) is not None:
        parts.append(f"seed {seed}")
    return " · ".join(parts)


def _hero(run: RunFolder) -> dict[str, str] | None:
    """Accuracy before and after, from summary.json or else from the evaluations there are."""
    evaluations = run.kind("evaluation")
    by_when = {row.get("when"): row.get("accuracy") for row in evaluations}
    before = run.summary.get("eval_accuracy_before", by_when.get("before"))
    after = run.summary.get("eval_accuracy_after", by_when.get("after"))
    if before is None:
        return None
    if after is None:
        latest = [row for row in evaluations if row.get("when") == "during"][-1:]
        note = f"{percent(latest[0]['accuracy'])} at step {latest[0]['step']}" if latest else "not yet evaluated again"
        return {"before": percent(before), "after": "?", "note": note}
    prompts = next((row["prompts"] for row in evaluations if row.get("prompts")), None)
    on = f" on {prompts} held-out prompts" if prompts else " on held-out prompts"
    return {"before": percent(before), "after": percent(after), "note": f"{100 * (after - before):+.1f} points{on}"}


def _tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """(name, value, note) of the other headline numbers that are known."""
    summary, rollouts, steps, syncs = run.summary, run.kind("rollout"), run.kind("step"), run.kind("sync")
    done = summary.get("steps", max((row["step"] for row in steps), default=0))
    planned = run.setting("algorithm.steps", run.setting("steps"))
    oldest = summary.get("max_staleness_seen", summary.get("max_staleness"))
    notes = [f"of {planned:,}"] if planned and planned != done else []
    if oldest is not None:
        notes.append(f"on data at most {oldest} steps old")
    tiles = [("Optimizer steps", f"{done:,}", ", ".join(notes))]
    if "wall_seconds" in summary:
        tiles.append(("Wall time", _duration(summary["wall_seconds"]), "start-up and evaluation included"))
    generated = summary.get("generated_tokens", sum(value or 0 for value in column(rollouts, "response/tokens")))
    trained = summary.get("trained_tokens", sum(value or 0 for value in column(steps, "tokens/trained")))
    if generated or trained:
        tiles.append(("Tokens", short(generated), f"generated; {short(trained)} trained on"))
    lengths = [value for value in column(rollouts, "response/length_mean") if value is not None]
    if lengths:
        which = "step" if run.asynchronous else "batch"
        tiles.append(("Response length", f"{lengths[0]:.0f} → {lengths[-1]:.0f}", f"tokens, first and last {which}"))
    mismatch = summary.get("mean_abs_logprob_diff", mean(column(run.kind(*MISMATCH_KINDS), "mismatch/mean_abs")))
    if mismatch is not None:
        tiles.append(("Engine-trainer mismatch", f"{mismatch:.1e}", "mean |log-prob difference|, equal weights"))
    if syncs or "weight_syncs" in summary:
        wrong = summary.get("weight_sync_mismatches", max((row.get("mismatches") or 0 for row in syncs), default=0))
        checked = sum(bool(row.get("verified")) for row in syncs)
        note = f"{checked} checked by checksum, {wrong} tensors wrong"
        tiles.append(("Weight syncs", f"{summary.get('weight_syncs', len(syncs)):,}", note))
    return tiles


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} m" if hours else f"{minute} m {second:02d} s"


def _unfinished(run: RunFolder) -> list[str]:
    """What a finished run would have and this one lacks."""
    lacks = [f"{name} ({FILES[name]}) is missing" for name in run.missing]
    if run.summary.get("status", "finished") != "finished":
        lacks.insert(0, f"the run ended as: {run.summary['status']}")
    planned, steps = run.setting("algorithm.steps", run.setting("steps")), run.kind("step")
    done = max((row["step"] for row in steps), default=0)
    if planned and done < planned:
        lacks.append(f"{done} of {planned} steps are done")
    whens = {row.get("when") for row in run.kind("evaluation")}
    if run.setting("algorithm") is not None:
        lacks += [f"there is no evaluation {when} training" for when in ("before", "after") if when not in whens]
    if run.broken_lines:
        lacks.append(f"{run.broken_lines} half-written lines were skipped")
    return lacks


def _sample_pairs(run: RunFolder) -> list[dict[str, Any]]:
    """Samples by prompt, each with its response before and after (either may be None)."""
    pairs: dict[tuple[str, int], dict[str, Any]] = {}
    for when, samples in (("before", run.samples_before), ("after", run.samples_after)):
        seen: dict[str, int] = {}
        for sample in samples:
            prompt = str(sample.get("prompt", ""))
            nth = seen[prompt] = seen.get(prompt, 0) + 1
            pair = pairs.setdefault((prompt, nth), {"prompt": prompt, "before": None, "after": None})
            pair[when] = sample
    return list(pairs.values())


def _files(run: RunFolder) -> list[tuple[str, str]]:
    """(name, what it is) of what lies beside the report."""
    known = [(name, what) for name, what in FILES.items() if (run.path / name).exists()]
    checkpoints = sorted(path.parent.name for path in run.path.glob("*/config.json"))
    if _has_recorded_trajectories(run):
        whose = "that were probed last" if run.asynchronous else "of the last rollout batch"
        known.append((f"{ROUTES_FOLDER}/", f"trajectories {whose} with the experts of each token"))
    return known + [(f"{name}/", "the trained model, in Hugging Face format") for name in checkpoints]


def _has_recorded_trajectories(run: RunFolder) -> bool:
    return (run.path / ROUTES_FOLDER / "trajectories.json").exists()


def _commands(run: RunFolder) -> list[tuple[str, str]]:
    """(what it does, command) of what to do next."""
    commands = [("Write this page again", f"megatron-vespo report {quote(str(run.path))}")]
    if list(run.path.glob("tensorboard/*")):
        commands.append(("Every curve, interactively", f"tensorboard --logdir {quote(str(run.path / 'tensorboard'))}"))
    if _has_recorded_trajectories(run):
        commands.append(("Which experts tokens went to", f"python tools/inspect_routing.py {quote(str(run.path))}"))
    for name in sorted(path.parent.name for path in run.path.glob("*/config.json")):
        commands.append(
            (
                "Measure the trained model on other tasks",
                f"megatron-vespo eval {quote(str(run.path / name))} TASKS.yaml",
            )
        )
    staleness, steps = run.setting("algorithm.staleness"), run.setting("algorithm.steps")
    fixed = run.setting("algorithm.prompts_per_rollout_batch") or run.setting("algorithm.asynchronous")
    if staleness and steps and not fixed:
        older = 4 * staleness
        overrides = f"algorithm.staleness={older} algorithm.steps={-(-steps // older) * older} {quote(f'run_dir={run.path}-n{older}')}"
        commands.append(
            ("The same run on older data", f"megatron-vespo train {quote(str(run.path / 'config.yaml'))} {overrides}")
        )
    return commands
