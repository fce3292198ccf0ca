"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): q and k are normalised per head; single layers may be dense."""

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.decoder import attention_entries, decoder_table, dense_entries, expert_entries
from megatron_vespo.checkpoint.mapping import Table


def table(architecture: Architecture) -> Table:
    return decoder_table(
        architecture,
        attention=attention_entries(architecture, qk_norm=True),
        feed_forward=(*dense_entries(architecture), *expert_entries(architecture)),
    )
