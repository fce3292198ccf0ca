"""Which mapping table an architecture has. A new architecture is a file like `qwen3_moe.py` and a line here."""

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint import llama, qwen3, qwen3_moe
from megatron_vespo.checkpoint.mapping import Table

TABLES = {
    "Qwen3MoeForCausalLM": qwen3_moe.table,
    "Qwen3ForCausalLM": qwen3.table,
    "LlamaForCausalLM": llama.table,
}


def table_of(architecture: Architecture) -> Table:
    return TABLES[architecture.architecture](architecture)
