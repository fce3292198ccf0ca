"""The two conversions as their commands call them: check everything, convert, say what came of it."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch

from megatron_vespo.architecture.hf_config import CONFIG_FILE, read_architecture
from megatron_vespo.config import ConfigError, LayoutConfig
from megatron_vespo.conversion import to_hf, to_megatron
from megatron_vespo.conversion.run import RunSettings, convert
from megatron_vespo.conversion.to_hf import ToHF
from megatron_vespo.conversion.to_megatron import HF_FOLDER, ToMegatron, require_equal_duplicates
from megatron_vespo.conversion.workers import joined_ranks
from megatron_vespo.errors import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGIT_TOLERANCE = 1e-5
"""See `LogitComparison.relative`."""


class Verification(StrEnum):
    BYTES = "bytes"
    LOGITS = "logits"


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    vocabulary_multiple: int = 1,
    dtype: str | None = None,
    verify: Sequence[Verification] = (),
    strict: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    file_bytes: int = to_megatron.DEFAULT_FILE_BYTES,
) -> None:
    """Write the Hugging Face folder `source` as the torch_dist checkpoint `target`.

    Args:
        tp, pp, ep, etp: see `ToMegatron.layout`; etp None is tp, or 1 if ep is more than 1.
        dtype: a key of `DTYPES`; None keeps each tensor's.
        processes: see `RunSettings`.
        strict: NaN or Inf is an error, not a warning.

    Raises:
        ConfigError: `source` is damaged or contradicts its config.json, or `target` can't be written.
        RunError: the verification failed.
    """
    is_moe = read_architecture(source).is_moe
    layout = LayoutConfig(tp=tp, pp=pp, ep=ep, etp=etp or (tp if ep == 1 and is_moe else 1))
    chosen = DTYPES[dtype] if dtype else None
    conversion = ToMegatron(source.resolve(), layout, vocabulary_multiple, chosen, file_bytes)
    conversion.output_files()
    require_equal_duplicates(conversion)
    settings = RunSettings(processes, strict, Verification.BYTES in verify, overwrite)
    with joined_ranks() as ranks:
        convert(conversion, target.absolute(), settings, ranks)
        if Verification.LOGITS in verify:
            ranks.on_first(lambda: _verify_logits(source, target, layout))


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    config_folder: Path | None = None,
    dtype: str | None = None,
    verify: Sequence[Verification] = (),
    strict: bool = False,
    overwrite: bool = False,
    processes: int | None = None,
    file_bytes: int = to_hf.DEFAULT_FILE_BYTES,
) -> None:
    """Write the weights in the torch_dist checkpoint `source` as the Hugging Face folder `target`.

    Args:
        config_folder: with config.json and the tokenizer's files; None: those in the checkpoint, if it was converted.

    Raises:
        As `hf_to_megatron`.
    """
    folder = config_folder or source / HF_FOLDER
    if config_folder is None and source.is_dir() and not (folder / CONFIG_FILE).exists():
        raise ConfigError(f"{source}: no {HF_FOLDER}/{CONFIG_FILE} inside; name a folder that has one with --config")
    conversion = ToHF(source.resolve(), folder.resolve(), DTYPES[dtype] if dtype else None, file_bytes)
    conversion.output_files()
    settings = RunSettings(processes, strict, Verification.BYTES in verify, overwrite)
    with joined_ranks() as ranks:
        convert(conversion, target.absolute(), settings, ranks)
        if Verification.LOGITS in verify:
            ranks.on_first(lambda: _verify_logits(target, source, LayoutConfig()))


def _verify_logits(hf: Path, megatron: Path, layout: LayoutConfig) -> None:
    from megatron_vespo.conversion.verify_logits import compare_logits  # imports Megatron, which nothing else needs

    found = compare_logits(hf, megatron, layout)
    figures = f"largest difference {found.largest_difference:.2g}, largest logit {found.largest_logit:.3g}"
    print(f"logits: {figures}", file=sys.stderr)
    if not found.relative <= LOGIT_TOLERANCE:
        raise RunError(
            f"{megatron}: logits differ from transformers' by more than {LOGIT_TOLERANCE} of them: {figures}"
        )
