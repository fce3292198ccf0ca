"""Trajectories on disk: arrays as safetensors, everything else as JSON. Nothing is unpickled."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from megatron_vespo.data.prompt import Prompt
from megatron_vespo.rollout.trajectory import Segment, Trajectory
from megatron_vespo.routing.routes import Routes

TOKENS = (
    "response_ids",
    "behavior_log_probs",
    "sampled",
    "proximal_log_probs",
    "reference_log_probs",
    "engine_log_weights",
)
"""Arrays [response tokens]; only the first three are always there."""
NUMBERS = ("reward", "advantage")
ROUTES = ("engine_routes", "proximal_routes")
"""Of each trajectory or of none or of some."""
ROUTE_ARRAYS = ("experts", "recorded", "weight_versions")


def write_trajectories(trajectories: list[Trajectory], folder: Path) -> None:
    """Write trajectories.safetensors and trajectories.json, from which `read_trajectories` has them back bit for bit.

    Only what a prompt's scorer was given (`Prompt.reference`) is left out: the responses were graded.
    """
    arrays: dict[str, np.ndarray] = {
        "prompt.token_ids": _joined([t.prompt.token_ids for t in trajectories], np.int32),
        "prompt.lengths": np.array([len(t.prompt.token_ids) for t in trajectories], dtype=np.int64),
        "lengths": np.array([len(t.response_ids) for t in trajectories], dtype=np.int64),
    }
    for name in NUMBERS:
        arrays[name] = np.array([getattr(t, name) for t in trajectories], dtype=np.float64)
    for name in TOKENS:
        values = [getattr(t, name) for t in trajectories]
        if values and all(value is not None for value in values):
            arrays[name] = _joined(values, values[0].dtype)
        elif any(value is not None for value in values):
            raise ValueError(f"{name}: some trajectories have it and some do not")
    for name in ROUTES:
        arrays |= _route_arrays(name, [routes for t in trajectories if (routes := getattr(t, name)) is not None])
    save_file(arrays, folder / "trajectories.safetensors")
    rest = [
        {
            "prompt": {"identity": t.prompt.identity, "text": t.prompt.text, "source": t.prompt.source},
            "sample": t.sample,
            "segments": [asdict(segment) for segment in t.segments],
            "finish_reason": t.finish_reason,
            "text": t.text,
            "outcome": t.outcome,
            "trained": t.trained,
            "routes": {
                name: {"masked": routes.masked, "wire_bytes": routes.wire_bytes}
                for name in ROUTES
                if (routes := getattr(t, name)) is not None
            },
        }
        for t in trajectories
    ]
    (folder / "trajectories.json").write_text(json.dumps(rest), encoding="utf-8")


def read_trajectories(folder: Path) -> list[Trajectory]:
    """What `write_trajectories` wrote; trajectories of one prompt share it."""
    arrays = load_file(folder / "trajectories.safetensors")
    rest: list[dict[str, Any]] = json.loads((folder / "trajectories.json").read_text(encoding="utf-8"))
    prompt_ids = _split(arrays["prompt.token_ids"], arrays["prompt.lengths"])
    tokens = {name: _split(arrays[name], arrays["lengths"]) for name in TOKENS if name in arrays}
    routes = {name: _routes(name, arrays) for name in ROUTES}
    prompts: dict[str, Prompt] = {}
    trajectories = []
    for number, row in enumerate(rest):
        prompt = prompts.setdefault(
            row["prompt"]["identity"], Prompt(**row["prompt"], token_ids=prompt_ids[number], reference=None)
        )
        own: dict[str, Any] = {name: pieces[number] for name, pieces in tokens.items()}
        own |= {name: float(arrays[name][number]) for name in NUMBERS}
        for name, told in row.pop("routes", {}).items():
            own[name] = Routes(**next(routes[name]), **told)
        segments = [Segment(**segment) for segment in row["segments"]]
        trajectories.append(Trajectory(**row | {"prompt": prompt, "segments": segments} | own))
    return trajectories


def _route_arrays(name: str, routes: list[Routes]) -> dict[str, np.ndarray]:
    """Of the trajectories that have them, behind each other."""
    if not routes:
        return {}
    lengths = np.array([len(one) for one in routes], dtype=np.int64)
    joined = {f"{name}.{part}": np.concatenate([getattr(one, part) for one in routes]) for part in ROUTE_ARRAYS}
    return joined | {f"{name}.lengths": lengths}


def _routes(name: str, arrays: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """`ROUTE_ARRAYS` of each trajectory that has them."""
    if f"{name}.lengths" in arrays:
        lengths = arrays[f"{name}.lengths"]
        for pieces in zip(*(_split(arrays[f"{name}.{part}"], lengths) for part in ROUTE_ARRAYS), strict=True):
            yield dict(zip(ROUTE_ARRAYS, pieces, strict=True))


def _joined(values: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(values).astype(dtype) if values else np.zeros(0, dtype)


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
