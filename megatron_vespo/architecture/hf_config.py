"""What a Hugging Face config.json says of a model, checked: whatever we would compute wrongly is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.architecture.hf_rope import positive_number, read_rope
from megatron_vespo.config import ConfigError
from megatron_vespo.errors import looked_in
from megatron_vespo.routing.routes import RoutingShape

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Family:
    """What a Hugging Face class is, whatever its config.json says."""

    qk_norm: bool
    has_experts: bool
    head_dim_required: bool = False
    """transformers' default for it is a constant, not hidden size over heads."""


FAMILIES = {
    "Qwen3MoeForCausalLM": Family(qk_norm=True, has_experts=True),
    "Qwen3ForCausalLM": Family(qk_norm=True, has_experts=False, head_dim_required=True),
    "LlamaForCausalLM": Family(qk_norm=False, has_experts=False),
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Field of `Architecture` -> required positive integer of config.json."""

EXPERT_SIZES = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
"""As `SIZES`, of models with experts."""

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
    qk_norm: bool
    """Queries and keys are normalised per head."""
    ffn_hidden_size: int
    """Width of a dense feed-forward layer; no layer of a model without dense layers uses it."""
    moe_layers: tuple[bool, ...]
    """Of each layer: is it MoE (else dense)?"""
    num_experts: int
    """Of each MoE layer; 0, as the other sizes of experts, in a model without."""
    experts_per_token: int
    moe_ffn_hidden_size: int
    """Width of one expert."""
    norm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    """Llama 3's `factor`; None where rotary frequencies are not scaled."""
    tied_embeddings: bool
    """The output layer is the embedding."""
    normalise_topk: bool
    """Gate weights of the chosen experts are divided by their sum; False in a model without experts."""
    max_position_embeddings: int

    @property
    def is_moe(self) -> bool:
        """Has at least one MoE layer."""
        return any(self.moe_layers)

    @property
    def routing_shape(self) -> RoutingShape:
        return RoutingShape(self.moe_layers, self.experts_per_token, self.num_experts)


def read_architecture(folder: str | Path) -> Architecture:
    """Read `folder`/config.json.

    Raises:
        ConfigError: every mistake at once, each naming the file and the field.
    """
    return parse_architecture(read_config_json(folder), Path(folder) / CONFIG_FILE)


def parse_architecture(values: dict[str, Any], path: Path) -> Architecture:
    """As `read_architecture`, of what the file at `path` holds."""
    name = _supported_name(values, path)
    family = FAMILIES[name]
    mistakes = [*_uncomputable(values), *_size_mistakes(values, family), *_layer_kind_mistakes(values, family)]
    mistakes += [f"{key}: expected true or false, found {values[key]!r}" for key in _not_flags(values)]
    read: dict[str, Any] = {}
    for getter in (read_rope, _norm_epsilon):
        try:
            read |= getter(values)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join([f"{path}: this model can't be used:", *(f"  {mistake}" for mistake in mistakes)]))
    read |= {field: values[_spelling(values, key)] for field, key in _sizes(family).items()}
    read |= {field: values.get(key, False) for field, key in FLAGS.items()}
    if family.has_experts:
        read["moe_layers"] = _moe_layers(values)
    else:
        read |= dict.fromkeys(EXPERT_SIZES, 0)
        read |= {"moe_layers": (False,) * values["num_hidden_layers"], "normalise_topk": False}
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return Architecture(architecture=name, head_dim=head_dim, qk_norm=family.qk_norm, **read)


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The mapping in `folder`/config.json.

    Raises:
        ConfigError: no such folder or file, or not a JSON mapping.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        if not folder.is_dir():
            found = "this is a file" if folder.exists() else f"no such folder{looked_in(folder)}"
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
    if values.get("mlp_bias"):
        mistakes.append("mlp_bias: biases in feed-forward layers are not supported, only false")
    if values.get("attention_dropout"):
        mistakes.append("attention_dropout: not supported, only 0")
    if values.get("use_sliding_window"):
        mistakes.append("use_sliding_window: sliding-window attention is not supported, only false")
    if kinds := set(values.get("layer_types") or ()) - {"full_attention"}:
        mistakes.append(f"layer_types: {', '.join(sorted(map(repr, kinds)))} not supported, only 'full_attention'")
    if values.get("pretraining_tp") not in (None, 1):
        mistakes.append(f"pretraining_tp: {values['pretraining_tp']!r} is not supported, only 1")
    if values.get("quantization_config"):
        mistakes.append("quantization_config: quantised weights can't be trained; use the unquantised checkpoint")
    return mistakes


def _sizes(family: Family) -> dict[str, str]:
    return SIZES | EXPERT_SIZES if family.has_experts else SIZES


def _spelling(values: dict[str, Any], key: str) -> str:
    """The key under which `values` has it: transformers calls Qwen3-MoE's `num_experts` also `num_local_experts`."""
    return "num_local_experts" if key == "num_experts" and key not in values else key


def _not_flags(values: dict[str, Any]) -> list[str]:
    return [key for key in FLAGS.values() if not isinstance(values.get(key, False), bool)]


def _size_mistakes(values: dict[str, Any], family: Family) -> list[str]:
    keys = [_spelling(values, key) for key in _sizes(family).values()]
    if values.get("head_dim") is not None or family.head_dim_required:
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
    if family.has_experts:
        experts, chosen = values[_spelling(values, "num_experts")], values["num_experts_per_tok"]
        if chosen > experts:
            mistakes.append(f"num_experts_per_tok: {chosen} is more than num_experts ({experts})")
    return mistakes


def _norm_epsilon(values: dict[str, Any]) -> dict[str, float]:
    return {"norm_epsilon": positive_number(values, "rms_norm_eps", "rms_norm_eps")}


def _layer_kind_mistakes(values: dict[str, Any], family: Family) -> list[str]:
    """Of the settings of `_moe_layers`."""
    layers, step = values.get("num_hidden_layers"), values.get("decoder_sparse_step", 1)
    if not family.has_experts or type(layers) is not int or layers < 1:
        return []
    mistakes = []
    if type(step) is not int or step < 1:
        mistakes.append(f"decoder_sparse_step: expected a positive integer, found {step!r}")
    dense = values.get("mlp_only_layers")
    if dense is not None and not (
        isinstance(dense, list) and all(type(layer) is int and 0 <= layer < layers for layer in dense)
    ):
        mistakes.append(f"mlp_only_layers: expected a list of layers, 0 to {layers - 1}, found {dense!r}")
    if not mistakes and not any(_moe_layers(values)):
        mistakes.append("mlp_only_layers, decoder_sparse_step: leave no MoE layer; such a model is Qwen3ForCausalLM")
    return mistakes


def _moe_layers(values: dict[str, Any]) -> tuple[bool, ...]:
    """The rule of transformers' Qwen3MoeDecoderLayer."""
    dense, step = values.get("mlp_only_layers") or [], values.get("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(values["num_hidden_layers"]))
