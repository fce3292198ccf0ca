"""Look into recorded trajectories: which experts the engine chose for each token, and which the trainer (docs/metrics.md).

python tools/inspect_routing.py runs/quickstart
python tools/inspect_routing.py runs/quickstart --trajectory 3 --only-disagreements
python tools/inspect_routing.py runs/quickstart/checkpoints/step_00000008 --trajectory 0 --layers 0,1 --json

A run that records routes keeps a few trajectories of its last rollout batch, scored by engine and trainer under the
same weights (run_dir/routing); a checkpoint has what was left of its rollout batch.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from megatron_vespo.cli import exit_code
from megatron_vespo.config import ConfigError
from megatron_vespo.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_vespo.rollout.trajectory import Trajectory
from megatron_vespo.rollout.trajectory_file import read_trajectories
from megatron_vespo.routing.routes import Routes

FILE = "trajectories.json"
PROMPT_WIDTH = 44
SAME, OTHER_ORDER, OTHER_EXPERTS, ONE_SIDED, NOTHING = (
    "same",
    "other order",
    "OTHER EXPERTS",
    "one side only",
    "no route",
)
DISAGREEMENTS = (OTHER_ORDER, OTHER_EXPERTS)
STYLES = {OTHER_ORDER: "yellow", OTHER_EXPERTS: "bold red", ONE_SIDED: "dim", NOTHING: "dim"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    path: Annotated[Path, typer.Argument(help="Folder of a run, its `routing` folder, or a checkpoint of it.")],
    trajectory: Annotated[int | None, typer.Option(help="Number of the one to show token by token.")] = None,
    layers: Annotated[str | None, typer.Option(help="MoE layers to show, from 0: 0,1 or 3. Default: all.")] = None,
    only_disagreements: Annotated[
        bool, typer.Option("--only-disagreements", help="Only tokens and layers where engine and trainer differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List recorded trajectories, or show one of them: experts by token and layer, and where engine and trainer disagree."""
    folder = trajectory_folder(path)
    trajectories = read(folder)
    if trajectory is None:
        if layers is not None or only_disagreements:
            raise ConfigError("--layers and --only-disagreements: choose a trajectory with --trajectory N")
        rows = [summary(number, one) for number, one in enumerate(trajectories)]
        print(json.dumps({"folder": str(folder), "trajectories": rows})) if as_json else show_list(folder, rows)
        return
    if not 0 <= trajectory < len(trajectories):
        raise ConfigError(f"--trajectory {trajectory}: {folder} has 0 to {len(trajectories) - 1}")
    chosen = trajectories[trajectory]
    detail = details(trajectory, chosen, chosen_layers(layers, chosen), texts_of(folder, chosen), only_disagreements)
    print(json.dumps(detail)) if as_json else show_details(detail)


def trajectory_folder(path: Path) -> Path:
    """Where the trajectories lie: `path` itself, or its `routing` folder if it is a run.

    Raises:
        ConfigError: neither.
    """
    for folder in (path, path / "routing"):
        if (folder / FILE).is_file():
            return folder
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder. Give the folder of a run or of a checkpoint")
    raise ConfigError(
        f"{path}: no recorded trajectories ({FILE}) here or in its folder `routing`. A run writes them with "
        "`routing.replay: R3` or `routing.record: true`, a checkpoint where its rollout batch was not used up"
    )


def read(folder: Path) -> list[Trajectory]:
    """Raises ConfigError if the files cannot be read or hold no routes."""
    try:
        trajectories = read_trajectories(folder)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise ConfigError(f"{folder}: the trajectories cannot be read: {type(error).__name__}: {error}") from error
    if not trajectories:
        raise ConfigError(f"{folder}: holds no trajectory (a checkpoint between two rollout batches has none)")
    for number, one in enumerate(trajectories):
        positions = len(one.prompt.token_ids) + len(one.response_ids) - 1
        shapes = {routes.experts.shape for routes in (one.engine_routes, one.proximal_routes) if routes is not None}
        if len(shapes) > 1 or any(shape[0] != positions for shape in shapes):
            found = " and ".join(str(shape) for shape in sorted(shapes))
            raise ConfigError(f"{folder}: trajectory {number} has {positions} positions, but routes of shape {found}")
    if all(one.engine_routes is None and one.proximal_routes is None for one in trajectories):
        raise ConfigError(f"{folder}: no trajectory has routes. Set `routing.record: true` or a `routing.replay`")
    return trajectories


def chosen_layers(text: str | None, trajectory: Trajectory) -> list[int]:
    """Of `--layers`. Raises ConfigError for what is no MoE layer."""
    routes = trajectory.engine_routes if trajectory.engine_routes is not None else trajectory.proximal_routes
    count = 0 if routes is None else routes.experts.shape[1]
    if text is None:
        return list(range(count))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--layers {text}: give numbers with commas between them, as 0,1") from None
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise ConfigError(f"--layers {text}: the trajectory has MoE layers 0 to {count - 1}")
    return layers


def texts_of(folder: Path, trajectory: Trajectory) -> list[str] | None:
    """Each token of prompt and response as text; None where the run's tokenizer cannot be loaded."""
    tokenizer = run_tokenizer(folder)
    if tokenizer is None:
        return None
    ids = [*trajectory.prompt.token_ids.tolist(), *trajectory.response_ids.tolist()]
    return [str(tokenizer.backend.decode([token])) for token in ids]


def run_tokenizer(folder: Path) -> ChatTokenizer | None:
    """Of `model.path` in the config.yaml of the run that `folder` belongs to; None and a note where there is none."""
    run = next((parent for parent in folder.absolute().parents[:2] if (parent / "config.yaml").is_file()), None)
    try:
        if run is None:
            raise ConfigError(f"no config.yaml above {folder}")
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return load_tokenizer(config["model"]["path"])
    except (ConfigError, OSError, yaml.YAMLError, LookupError, TypeError) as error:
        print(f"tokens are shown as ids: {error}", file=sys.stderr)
        return None


def summary(number: int, trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory without its tokens."""
    return {
        "number": number,
        "prompt": trajectory.prompt.text,
        "sample": trajectory.sample,
        "prompt_tokens": len(trajectory.prompt.token_ids),
        "response_tokens": len(trajectory.response_ids),
        "segments": [
            {"start": one.start, "end": one.end, "weight_version": one.weight_version} for one in trajectory.segments
        ],
        "engine": recording(trajectory.engine_routes),
        "trainer": recording(trajectory.proximal_routes),
        "agreement": layer_agreement(trajectory),
    }


def recording(routes: Routes | None) -> dict[str, Any] | None:
    if routes is None:
        return None
    versions = sorted({int(version) for version in routes.weight_versions[routes.recorded]})
    return {
        "positions": len(routes),
        "recorded": int(routes.recorded.sum()),
        "weight_versions": versions,
        "masked": routes.masked,
        "wire_bytes": routes.wire_bytes,
    }


def layer_agreement(trajectory: Trajectory) -> list[dict[str, Any]] | None:
    """Of each MoE layer, over positions that both have: how many, and where experts and their order are the same."""
    engine, trainer = trajectory.engine_routes, trajectory.proximal_routes
    if engine is None or trainer is None:
        return None
    rows = engine.recorded & trainer.recorded
    same_set, same_slots = compared(engine.experts[rows], trainer.experts[rows])
    return [
        {"layer": layer, "positions": len(same_set), "same_set": int(a), "same_slots": int(b)}
        for layer, (a, b) in enumerate(zip(same_set.sum(0), same_slots.sum(0), strict=True))
    ]


def compared(one: NDArray, other: NDArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[positions, layers, topk] twice -> [positions, layers] twice: the same experts, and in the same slots."""
    return (np.sort(one, -1) == np.sort(other, -1)).all(-1), (one == other).all(-1)


def details(
    number: int, trajectory: Trajectory, layers: list[int], texts: list[str] | None, only_disagreements: bool
) -> dict[str, Any]:
    """A trajectory with its positions; position i has token i as input and decides token i + 1."""
    ids = [*trajectory.prompt.token_ids.tolist(), *trajectory.response_ids.tolist()]
    positions = []
    for position in range(len(ids) - 1):
        found = [choice(trajectory, position, layer) for layer in layers]
        if only_disagreements:
            found = [one for one in found if one["verdict"] in DISAGREEMENTS]
        if not found and only_disagreements:
            continue
        positions.append(
            {
                "position": position,
                "token_id": ids[position],
                "token": texts[position] if texts else None,
                "of": "prompt" if position < len(trajectory.prompt.token_ids) else "response",
                "weight_version": version_at(trajectory.engine_routes, position),
                "layers": found,
            }
        )
    told = summary(number, trajectory)
    if told["agreement"] is not None:
        told["agreement"] = [one for one in told["agreement"] if one["layer"] in layers]
    return {**told, "positions": positions}


def choice(trajectory: Trajectory, position: int, layer: int) -> dict[str, Any]:
    """Experts of one position and layer, by engine and by trainer, and how they compare."""
    engine, trainer = (
        routes.experts[position, layer].tolist() if routes is not None and routes.recorded[position] else None
        for routes in (trajectory.engine_routes, trajectory.proximal_routes)
    )
    return {"layer": layer, "engine": engine, "trainer": trainer, "verdict": verdict(engine, trainer)}


def verdict(engine: list[int] | None, trainer: list[int] | None) -> str:
    if engine is None or trainer is None:
        return NOTHING if engine is None and trainer is None else ONE_SIDED
    if engine == trainer:
        return SAME
    return OTHER_ORDER if sorted(engine) == sorted(trainer) else OTHER_EXPERTS


def version_at(routes: Routes | None, position: int) -> int | None:
    return int(routes.weight_versions[position]) if routes is not None and routes.recorded[position] else None


def show_list(folder: Path, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{len(rows)} trajectories in {folder}", title_justify="left")
    for heading in (
        "#",
        "prompt",
        "sample",
        "tokens",
        "weights",
        "engine's rows",
        "trainer's rows",
        "masked",
        "agree",
        "same order",
    ):
        table.add_column(heading, justify="left" if heading in ("prompt", "masked") else "right")
    for row in rows:
        prompt = " ".join(row["prompt"].split())
        table.add_row(
            str(row["number"]),
            Text(prompt if len(prompt) <= PROMPT_WIDTH else f"...{prompt[3 - PROMPT_WIDTH :]}"),
            str(row["sample"]),
            f"{row['prompt_tokens']}+{row['response_tokens']}",
            versions_text(row),
            rows_text(row["engine"]),
            rows_text(row["trainer"]),
            masked_text(row["engine"]),
            share_text(row["agreement"], "same_set"),
            share_text(row["agreement"], "same_slots"),
        )
    console().print(table)


def show_details(detail: dict[str, Any]) -> None:
    out = console()
    out.print(Text(f"trajectory {detail['number']}, sample {detail['sample']}: {detail['prompt']}", "bold"))
    out.print(
        f"{detail['prompt_tokens']}+{detail['response_tokens']} tokens, weights {versions_text(detail)}; rows of the "
        f"engine {rows_text(detail['engine'])}, of the trainer {rows_text(detail['trainer'])}"
    )
    if masked := masked_text(detail["engine"]):
        out.print(f"masked: {masked}", markup=False)
    for layer in detail["agreement"] or ():
        share = [layer]
        out.print(
            f"layer {layer['layer']}: {share_text(share, 'same_set')} the same experts, "
            f"{share_text(share, 'same_slots')} also in the same order, of {layer['positions']} positions"
        )
    table = Table()
    for heading in ("position", "input token", "of", "weights", "layer", "engine", "trainer", ""):
        table.add_column(heading, justify="right" if heading in ("position", "weights", "layer") else "left")
    for row in detail["positions"]:
        # The ends of tokens are to be seen: many begin with a space.
        token = Text(str(row["token_id"]) if row["token"] is None else json.dumps(row["token"], ensure_ascii=False))
        version = "-" if row["weight_version"] is None else str(row["weight_version"])
        head = [str(row["position"]), token, row["of"], version]
        for one in row["layers"]:
            table.add_row(
                *head,
                str(one["layer"]),
                experts_text(one["engine"], one["trainer"]),
                experts_text(one["trainer"], one["engine"]),
                "" if one["verdict"] == SAME else Text(one["verdict"], STYLES[one["verdict"]]),
            )
            head = [""] * len(head)
    out.print(table)


def console() -> Console:
    """As wide as the terminal; in a file or pipe wide enough that no line is broken."""
    out = Console()
    return out if out.is_terminal else Console(width=200)


def experts_text(experts: list[int] | None, others: list[int] | None) -> Text:
    """Those that the other side lacks are marked."""
    if experts is None:
        return Text("-", "dim")
    parts = [
        Text(f"{expert}", "bold red underline") if others is not None and expert not in others else Text(f"{expert}")
        for expert in experts
    ]
    return Text(" ").join(parts)


def versions_text(row: dict[str, Any]) -> str:
    """Of the segments, in their order: 4, or 4 > 5 where weights changed within the response."""
    return " > ".join(str(segment["weight_version"]) for segment in row["segments"])


def rows_text(found: dict[str, Any] | None) -> str:
    return "none" if found is None else f"{found['recorded']}/{found['positions']}"


def masked_text(found: dict[str, Any] | None) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(found["masked"].items())) if found else ""


def share_text(layers: list[dict[str, Any]] | None, name: str) -> str:
    """Over (position, layer) that both have; 100.0% is all of them, not nearly all."""
    count = sum(layer["positions"] for layer in layers or ())
    same = sum(layer[name] for layer in layers or ())
    if not count:
        return "-"
    return "100.0%" if same == count else f"{min(0.999, same / count):.1%}"


if __name__ == "__main__":
    sys.exit(exit_code(app))
