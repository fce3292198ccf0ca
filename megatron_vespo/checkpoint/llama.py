"""Llama (3, 3.1, 3.2, 3.3): q and k are not normalised."""

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.decoder import attention_entries, decoder_table, dense_entries
from megatron_vespo.checkpoint.mapping import Table


def table(architecture: Architecture) -> Table:
    return decoder_table(
        architecture,
        attention=attention_entries(architecture, qk_norm=False),
        feed_forward=dense_entries(architecture),
    )
