"""What a Hugging Face config.json says of a model, checked: whatever we would compute wrongly is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.config import ConfigError

CONFIG_FILE = "config.json"
SUPPORTED_ARCHITECTURES = ("Qwen3MoeForCausalLM",)

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Field of `Architecture` -> required positive integer of config.json."""

FLAGS = {"tied_embeddings": "tie_word_embeddings", "normalise_topk": "norm_topk_prob"}
"""Field of `Architecture` -> boolean of config.json; false where it is absent, as in transformers."""


@dataclass(frozen=True)
class Architecture:
    """A model's shape. Field names are Megatron-Core's, or say it plainly; sizes are of the whole model."""

    architecture: str
    """Name of the Hugging Face class, one of `SUPPORTED_ARCHITECTURES`."""
    vocab_size: int
    """Rows of the embedding (may exceed the tokenizer's ids)."""
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    ffn_hidden_size: int
    """Width of a dense feed-forward layer; no layer of a model without dense layers uses it."""
    num_experts: int
    experts_per_token: int
    moe_ffn_hidden_size: int
    """Width of one expert."""
    norm_epsilon: float
    rotary_base: float
    tied_embeddings: bool
    """The output layer is the embedding."""
    normalise_topk: bool
    """Gate weights of the chosen experts are divided by their sum."""
    max_position_embeddings: int


def read_architecture(folder: str | Path) -> Architecture:
    """Read `folder`/config.json.

    Raises:
        ConfigError: every mistake at once, each naming the file and the field.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_config_json(folder)
    name = _supported_name(values, path)
    mistakes = [*_uncomputable(values), *_size_mistakes(values)]
    numbers: dict[str, Any] = {}
    for field, getter in (("rotary_base", _rotary_base), ("norm_epsilon", _norm_epsilon)):
        try:
            numbers[field] = getter(values)
        except ValueError as error:
            mistakes.append(str(error))
    flags = {field: values.get(key, False) for field, key in FLAGS.items()}
    mistakes += [f"{key}: expected true or false, found {values[key]!r}" for key in _not_flags(values)]
    if mistakes:
        raise ConfigError("\n".join([f"{path}: this model can't be used:", *(f"  {mistake}" for mistake in mistakes)]))
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    sizes = {field: values[_spelling(values, key)] for field, key in SIZES.items()}
    return Architecture(
        architecture=name,
        head_dim=head_dim,
        **sizes,
        **flags,
        **numbers,
    )


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The mapping in `folder`/config.json.

    Raises:
        ConfigError: no such folder or file, or not a JSON mapping.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        if not folder.is_dir():
            found = "this is a file" if folder.exists() else "no such folder"
            raise ConfigError(f"{folder}: {found}; a model is a folder with {CONFIG_FILE}, a tokenizer and safetensors")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {CONFIG_FILE} in this folder; is it a model in Hugging Face format?") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(values).__name__}")
    return values


def _supported_name(values: dict[str, Any], path: Path) -> str:
    names = values.get("architectures")
    known = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(f"{path}: architectures: expected a list of one name, found {names!r}; supported: {known}")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(f"{path}: architectures: {names[0]} is not supported; supported: {known}")
    return names[0]


def _uncomputable(values: dict[str, Any]) -> list[str]:
    """Settings that the Megatron model that we build does not follow."""
    mistakes = []
    if values.get("hidden_act", "silu") != "silu":
        mistakes.append(f"hidden_act: {values['hidden_act']!r} is not supported, only 'silu'")
    if values.get("attention_bias"):
        mistakes.append("attention_bias: biases in attention are not supported, only false")
    if values.get("attention_dropout"):
        mistakes.append("attention_dropout: not supported, only 0")
    if values.get("use_sliding_window"):
        mistakes.append("use_sliding_window: sliding-window attention is not supported, only false")
    if values.get("mlp_only_layers"):
        mistakes.append(
            f"mlp_only_layers: dense layers ({values['mlp_only_layers']}) among MoE layers are not supported"
        )
    if values.get("decoder_sparse_step", 1) != 1:
        mistakes.append(
            f"decoder_sparse_step: {values['decoder_sparse_step']!r} is not supported, only 1 (all layers MoE)"
        )
    if values.get("quantization_config"):
        mistakes.append("quantization_config: quantised weights can't be trained; use the unquantised checkpoint")
    return mistakes


def _spelling(values: dict[str, Any], key: str) -> str:
    """The key under which `values` has it: transformers calls Qwen3-MoE's `num_experts` also `num_local_experts`."""
    return "num_local_experts" if key == "num_experts" and key not in values else key


def _not_flags(values: dict[str, Any]) -> list[str]:
    return [key for key in FLAGS.values() if not isinstance(values.get(key, False), bool)]


def _size_mistakes(values: dict[str, Any]) -> list[str]:
    keys = [_spelling(values, key) for key in SIZES.values()]
    if values.get("head_dim") is not None:
        keys.append("head_dim")
    mistakes = []
    for key in keys:
        value = values.get(key)
        if value is None:
            mistakes.append(f"{key if key != 'num_local_experts' else 'num_experts'}: missing")
        elif type(value) is not int or value < 1:
            mistakes.append(f"{key}: expected a positive integer, found {value!r}")
    if mistakes:
        return mistakes
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        mistakes.append(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads ({groups})")
    if values.get("head_dim") is None and values["hidden_size"] % heads:
        mistakes.append(f"hidden_size: {values['hidden_size']} is not a multiple of num_attention_heads ({heads})")
    experts, chosen = values[_spelling(values, "num_experts")], values["num_experts_per_tok"]
    if chosen > experts:
        mistakes.append(f"num_experts_per_tok: {chosen} is more than num_experts ({experts})")
    return mistakes


def _norm_epsilon(values: dict[str, Any]) -> float:
    return _positive(values, "rms_norm_eps", "rms_norm_eps")


def _rotary_base(values: dict[str, Any]) -> float:
    """transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood at the top."""
    nested = values.get("rope_parameters")
    where, key = (nested, "rope_parameters") if nested else (values.get("rope_scaling"), "rope_scaling")
    if where is not None and not isinstance(where, dict):
        raise ValueError(f"{key}: expected a mapping, found {where!r}")
    where = where or {}
    kind = where.get("rope_type", where.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{key}: rope scaling ({kind!r}) is not supported, only 'default'")
    if where.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: not supported, only 1.0")
    if "rope_theta" in where:
        return _positive(where, "rope_theta", f"{key}.rope_theta")
    return _positive(values, "rope_theta", "rope_theta")


def _positive(values: dict[str, Any], key: str, shown: str) -> float:
    value = values.get(key)
    if value is None:
        raise ValueError(f"{shown}: missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{shown}: expected a positive number, found {value!r}")
    return float(value)
