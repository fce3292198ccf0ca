"""Routing replay: which recorded experts the trainer uses instead of its own choice."""

from typing import Literal

from pydantic import PositiveInt, field_validator

from megatron_vespo.config.section import Section


class RoutingConfig(Section):
    replay: Literal["off", "R2", "R3"] = "off"
    """`off`: the trainer routes by itself. `R2`: as it did itself at the start of the rollout batch (a forward pass more,
    unless `algorithm.old_policy` is proximal). `R3`: as the engine did when it sampled."""
    record: bool = False
    """Record the engine's routes also where nothing replays them, to measure agreement. R3 always records."""
    probe_trajectories: PositiveInt = 8
    """Of each rollout batch, scored with and without the engine's routes to see what replay changes, where they are
    recorded."""

    @field_validator("replay", mode="before")
    @classmethod
    def _yaml_off(cls, value: object) -> object:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value

    @property
    def engine_records(self) -> bool:
        return self.record or self.replay == "R3"
