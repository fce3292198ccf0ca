"""Convert a Megatron-Core torch_dist checkpoint into a Hugging Face folder (docs/checkpoints.md).

python tools/convert_megatron_to_hf.py --megatron Qwen3-30B-A3B-torch_dist --out Qwen3-30B-A3B --verify bytes
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_vespo.cli import exit_code
from megatron_vespo.conversion.commands import megatron_to_hf
from megatron_vespo.conversion.options import (
    Dtype,
    FileMB,
    Overwrite,
    Strict,
    Verify,
    Workers,
    file_bytes_or,
)
from megatron_vespo.conversion.to_hf import DEFAULT_FILE_BYTES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    megatron: Annotated[Path, typer.Option(help="torch_dist checkpoint to read; an optimizer in it is passed over.")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write; appears once it is complete.")],
    config: Annotated[
        Path | None, typer.Option(help="Folder with config.json and tokenizer; default: hf/ in the checkpoint.")
    ] = None,
    dtype: Dtype = None,
    verify: Verify = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    workers: Workers = None,
    file_mb: FileMB = None,
) -> None:
    """Convert a Megatron-Core torch_dist checkpoint into a Hugging Face folder. Run it again to take up where it was killed."""
    megatron_to_hf(
        megatron,
        out,
        config_folder=config,
        dtype=dtype,
        verify=verify or (),
        strict=strict,
        overwrite=overwrite,
        processes=workers,
        file_bytes=file_bytes_or(DEFAULT_FILE_BYTES, file_mb),
    )
    print(f"folder   {out}")


if __name__ == "__main__":
    sys.exit(exit_code(app))
