"""Qwen3, dense (0.6B to 32B): q and k are normalised per head."""

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.decoder import attention_entries, decoder_table, dense_entries
from megatron_vespo.checkpoint.mapping import Table


def table(architecture: Architecture) -> Table:
    return decoder_table(
        architecture,
        attention=attention_entries(architecture, qk_norm=True),
        feed_forward=dense_entries(architecture),
    )
