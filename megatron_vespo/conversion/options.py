"""Options that the two conversion commands share."""

from typing import Annotated, Literal

import typer

from megatron_vespo.conversion.commands import Verification

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Cast every tensor; else each keeps its dtype.")
]
Verify = Annotated[
    list[Verification] | None,
    typer.Option(
        help="bytes: read everything back, convert it back and compare bit for bit, before the output gets its name. "
        "logits: run both models in float32 on the same tokens and compare. May be given twice."
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Tensors with NaN or Inf are an error, not a warning.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that exists, once the new is complete.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes; default: one for each core, at most 8, and fewer for a small model; under torchrun 1 for each rank.",
    ),
]
FileMB = Annotated[float | None, typer.Option(help="Size of one output file in MB, the unit that a rerun takes up.")]


def file_bytes_or(default: int, megabytes: float | None) -> int:
    return default if megabytes is None else max(1, int(megabytes * 1e6))
