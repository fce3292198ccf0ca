"""Convert a Hugging Face folder into a Megatron-Core torch_dist checkpoint (docs/checkpoints.md).

python tools/convert_hf_to_megatron.py --hf Qwen3-30B-A3B --out Qwen3-30B-A3B-torch_dist --tp 2 --ep 8 --verify bytes
torchrun --nproc-per-node 8 tools/convert_hf_to_megatron.py --hf Qwen3-30B-A3B --out Qwen3-30B-A3B-torch_dist
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_vespo.cli import exit_code
from megatron_vespo.conversion.commands import hf_to_megatron
from megatron_vespo.conversion.options import (
    Dtype,
    FileMB,
    Overwrite,
    Strict,
    Verify,
    Workers,
    file_bytes_or,
)
from megatron_vespo.conversion.to_megatron import DEFAULT_FILE_BYTES

Size = Annotated[int, typer.Option(min=1, help="Cut tensors and files for ranks of this layout (any other loads too).")]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder to read.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write; appears once it is complete.")],
    tp: Size = 1,
    pp: Size = 1,
    ep: Size = 1,
    etp: Annotated[int | None, typer.Option(min=1, help="Default: tp, or 1 with ep above 1.")] = None,
    vocabulary_multiple: Annotated[int, typer.Option(min=1, help="Pad each rank's vocabulary to a multiple.")] = 1,
    dtype: Dtype = None,
    verify: Verify = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    file_mb: FileMB = None,
) -> None:
    """Convert a Hugging Face folder into a Megatron-Core torch_dist checkpoint. Run it again to take up where it was killed."""
    hf_to_megatron(
        hf,
        out,
        tp=tp,
        pp=pp,
        ep=ep,
        etp=etp,
        vocabulary_multiple=vocabulary_multiple,
        dtype=dtype,
        verify=verify or (),
        strict=strict,
        overwrite=overwrite,
        processes=workers,
        file_bytes=file_bytes_or(DEFAULT_FILE_BYTES, file_mb),
    )
    print(f"checkpoint   {out}")


if __name__ == "__main__":
    sys.exit(exit_code(app))
