"""What a configuration asks of this host."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.doctor.finding import Finding
from megatron_vespo.doctor.probe import Probe, run_probe

READ = """
from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.interface import choose_interface
config = load_config(TrainConfig, sys.argv[2], sys.argv[3:])
choose_interface(config.cluster.interface)
report(
    run_dir=config.run_dir,
    model=config.model.path,
    sockets=config.rollout.concurrent_groups * config.rollout.group_size,
    flex=config.policy.token_dispatcher == "flex",
    checkpoints=config.checkpoint.keep_last + 1 if config.checkpoint.save_every else 0,
    exports=1 + (config.algorithm.steps // config.checkpoint.export_every if config.checkpoint.export_every else 0),
)
"""
PREPARE = """
from megatron_vespo.config import TrainConfig, load_config
from megatron_vespo.orchestration.preflight import prepare_training
prepared = prepare_training(load_config(TrainConfig, sys.argv[2], sys.argv[3:]))
report(architecture=prepared.architecture.architecture, held_out=len(prepared.held_out))
"""
STATE_OVER_WEIGHTS = 7
"""A checkpoint has 14 bytes for each parameter (bf16 weights, fp32 masters and two moments), a bf16 model 2."""


@dataclass(frozen=True)
class Needs:
    """Of a run. `disk_gb` is for checkpoints and exports; None: not known, since the model is not here."""

    run_dir: Path
    sockets: int
    flex: bool = False
    disk_gb: float | None = None


def check_configuration(config: Path, overrides: tuple[str, ...], seconds: float) -> tuple[Finding, Needs | None]:
    """Read it, as a run would; and what it needs, where it can be read."""
    probe = run_probe(READ, seconds, (str(config), *overrides))
    if not probe.ok:
        mend = f"megatron-vespo train {' '.join((str(config), *overrides))} --dry-run"
        return Finding("configuration", "failed", told(probe), "settings that can work", "no run", mend), None
    values = probe.values
    weights = sum(file.stat().st_size for file in Path(values["model"]).glob("*.safetensors"))
    copies = values["checkpoints"] * STATE_OVER_WEIGHTS + values["exports"]
    disk_gb = copies * weights / 2**30 if weights else None
    needs = Needs(Path(values["run_dir"]), values["sockets"], values["flex"], disk_gb)
    return Finding("configuration", "ok", f"{config} can be read"), needs


def check_preparation(config: Path, overrides: tuple[str, ...], seconds: float) -> Finding:
    """All that a run checks before it starts a process: model folder, layout, tokenizer, tasks, scorers."""
    probe = run_probe(PREPARE, seconds, (str(config), *overrides))
    if not probe.ok:
        return Finding("model and tasks", "failed", told(probe), "inputs that can be used", "no run", "as it says")
    found = f"{probe.values['architecture']}, {probe.values['held_out']} held-out prompts"
    return Finding("model and tasks", "ok", found)


def told(probe: Probe) -> str:
    """A mistake of the user's says itself what is wrong; of others it matters where they came from."""
    return probe.message if probe.kind == "ConfigError" else probe.error
