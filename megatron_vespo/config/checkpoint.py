"""What a run keeps so that it can go on after it ended early."""

from pydantic import Field, PositiveInt

from megatron_vespo.config.section import Section


class CheckpointConfig(Section):
    save_every: int = Field(default=0, ge=0)
    """Save everything that is needed to go on after each so many optimizer steps; 0: never. Training goes on meanwhile."""
    keep_last: PositiveInt = 2
    """Newest complete checkpoints that stay."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are a multiple of this stay, too; 0: none."""
    export_every: int = Field(default=0, ge=0)
    """Also write the model as a Hugging Face folder, `run_dir/exports/step_...`, after each so many optimizer steps;
    0: only at the end, as `run_dir/checkpoint`."""
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Deadline of writing or reading one."""
