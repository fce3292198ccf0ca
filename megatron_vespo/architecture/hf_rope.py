"""Rotary position embeddings in a Hugging Face config.json: what Megatron-Core's RotaryEmbedding computes alike."""

from typing import Any

LLAMA_3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Constants of Llama 3's scaling in Megatron-Core (rotary_pos_embedding.py, `_apply_scaling`); `factor` is free."""


def read_rope(values: dict[str, Any]) -> dict[str, float | None]:
    """`rotary_base` and `rope_scaling_factor` (None: not scaled) of a config.json.

    transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood at the top.

    Raises:
        ValueError: a kind of rotary embedding that would be computed wrongly; names the field.
    """
    settings, key = _settings(values)
    if settings.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor: not supported, only 1.0")
    match settings.get("rope_type", settings.get("type", "default")):
        case "default":
            factor = None
        case "llama3":
            factor = _llama_3_factor(settings, values, key)
        case kind:
            raise ValueError(f"{key}: rope scaling ({kind!r}) is not supported, only 'default' and 'llama3'")
    if "rope_theta" in settings:
        base = positive_number(settings, "rope_theta", f"{key}.rope_theta")
    else:
        base = positive_number(values, "rope_theta", "rope_theta")
    return {"rotary_base": base, "rope_scaling_factor": factor}


def _settings(values: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The mapping that says how, and its key."""
    given = {key: values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)}
    for key, settings in given.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{key}: expected a mapping, found {settings!r}")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise ValueError("rope_parameters, rope_scaling: both are given and differ; remove the one that is wrong")
    for key, settings in given.items():
        return settings, key
    return {}, "rope_parameters"


def _llama_3_factor(settings: dict[str, Any], values: dict[str, Any], key: str) -> float:
    at_the_top = {"original_max_position_embeddings"} & values.keys()  # where transformers prefers it
    for name, required in LLAMA_3.items():
        found = values[name] if name in at_the_top else settings.get(name)
        if found != required:
            raise ValueError(f"{key}.{name}: {found!r} is not supported with rope_type 'llama3', only {required}")
    return positive_number(settings, "factor", f"{key}.factor")


def positive_number(values: dict[str, Any], key: str, shown: str) -> float:
    """`values[key]`. Raises ValueError, which calls it `shown`, if it is missing or not a positive number."""
    value = values.get(key)
    if value is None:
        raise ValueError(f"{shown}: missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{shown}: expected a positive number, found {value!r}")
    return float(value)
