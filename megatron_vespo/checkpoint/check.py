"""Is a folder a model that we can load? Decided from config.json and safetensors headers, before anything starts."""

from pathlib import Path

from megatron_vespo.architecture.hf_config import CONFIG_FILE, Architecture, read_architecture
from megatron_vespo.checkpoint.mapping import Table
from megatron_vespo.checkpoint.safetensors_folder import Headers, TensorHeader, read_headers
from megatron_vespo.checkpoint.tables import table_of
from megatron_vespo.config import ConfigError

LOADABLE_DTYPES = ("F32", "BF16", "F16")


def check_folder(folder: str | Path) -> Architecture:
    """The folder's architecture, once config.json and the headers of all its tensors agree. Reads no tensor data.

    Raises:
        ConfigError: lists every missing shard, damaged file, and missing, extra or mis-shaped tensor.
    """
    architecture = read_architecture(folder)
    checked_tensors(folder, architecture)
    return architecture


def checked_tensors(folder: str | Path, architecture: Architecture) -> dict[str, TensorHeader]:
    """Headers of the folder's tensors, which are exactly those of `architecture`. Raises as `check_folder`."""
    headers = read_headers(folder)
    problems = list(headers.problems)
    if headers.tensors or not problems:  # where no file could be read, that every tensor is missing says nothing more
        problems += _tensor_problems(headers, table_of(architecture), architecture)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{folder}: {count} with the tensors of this {architecture.architecture}\n{listed}")
    return headers.tensors


def _tensor_problems(headers: Headers, table: Table, architecture: Architecture) -> list[str]:
    expected = table.hf_shapes(architecture)
    allowed = expected | {copy: expected[original] for copy, original in table.duplicates.items()}
    problems = []
    for name in expected.keys() - headers.tensors.keys() - headers.unreadable:
        problems.append(f"{name}: missing, expected shape {list(expected[name])}{_why_expected(name)}")
    for name in headers.tensors.keys() - allowed.keys():
        problems.append(f"{name}: extra, shape {list(headers.tensors[name].shape)}; {CONFIG_FILE} has no place for it")
    for name in headers.tensors.keys() & allowed.keys():
        found = headers.tensors[name]
        if found.shape != allowed[name]:
            problems.append(f"{name}: has shape {list(found.shape)}, expected {list(allowed[name])} from {CONFIG_FILE}")
        if found.dtype not in LOADABLE_DTYPES:
            problems.append(f"{name}: has dtype {found.dtype}, expected one of {', '.join(LOADABLE_DTYPES)}")
    return sorted(problems)


def _why_expected(name: str) -> str:
    return " (it may be absent only if tie_word_embeddings is true)" if name == "lm_head.weight" else ""
