"""`megatron-vespo plan`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import ConfigError, TrainConfig, load_config
from megatron_vespo.config.planning import RatesConfig
from megatron_vespo.planning.hardware import hardware, parse_bytes
from megatron_vespo.planning.memory_plan import Machines, plan_memory
from megatron_vespo.planning.memory_view import memory_figures, print_plan
from megatron_vespo.planning.published import QWEN3_30B_A3B_ON_H100
from megatron_vespo.planning.split import bounds_of, lengths_of, plan_split
from megatron_vespo.planning.split_table import print_split, split_figures


@dataclass(frozen=True)
class PlanOptions:
    """The command line's, as it was given."""

    nodes: int | None = None
    gpus_per_node: int = 8
    gpus: int | None = None
    gpu: str = "h100"
    gpu_memory: str | None = None
    host_memory: str = "1000GB"
    splits: bool = False
    max_staleness: Sequence[int] = ()
    rates: Path | None = None
    prompt_tokens: int | None = None
    median_response: float | None = None
    sigma: float | None = None


def machines_of(options: PlanOptions) -> Machines:
    """Raises ConfigError where both --nodes and --gpus are given and differ, or a value is none."""
    gpu = hardware(options.gpu)
    from_nodes = None if options.nodes is None else options.nodes * options.gpus_per_node
    if options.gpus is not None and from_nodes is not None and options.gpus != from_nodes:
        raise ConfigError(
            f"--gpus {options.gpus}: --nodes {options.nodes} x --gpus-per-node {options.gpus_per_node} are {from_nodes}: "
            "leave one of them out"
        )
    return Machines(
        gpu,
        gpu.memory if options.gpu_memory is None else parse_bytes(options.gpu_memory, "--gpu-memory"),
        options.gpus if options.gpus is not None else from_nodes,
        options.gpus_per_node,
        parse_bytes(options.host_memory, "--host-memory"),
    )


def run_plan(config: TrainConfig, options: PlanOptions, *, explain: bool, as_json: bool) -> bool:
    """Print the plan. Returns whether the configuration fits.

    Raises:
        ConfigError: an option or a setting cannot be planned with.
    """
    lengths = lengths_of(config, options.prompt_tokens, options.median_response, options.sigma)
    plan = plan_memory(config, machines_of(options), lengths)
    speeds, rows = QWEN3_30B_A3B_ON_H100, []
    if options.splits:
        speeds = speeds if options.rates is None else load_config(RatesConfig, options.rates)
        gpus = plan.machines.gpus or plan.gpus_used
        rows = plan_split(config, gpus, speeds, lengths, bounds_of(config, options.max_staleness))
    if as_json:
        figures = {"memory": memory_figures(plan)}
        print(json.dumps(figures | (split_figures(speeds, lengths, rows) if rows else {}), indent=1))
        return not plan.problems
    if rows:
        print_split(speeds, lengths, rows)
    print_plan(plan, explain)
    return not plan.problems
