"""Rate of the checkpoint conversion, both ways, against plain copying of the same files, and its peak memory.

    OMP_NUM_THREADS=1 python benchmarks/conversion.py --folder /data/tmp --out results/conversion.json

The model is synthetic: Qwen3-30B-A3B's shapes and fewer layers, random weights. Conversions run as their commands do,
in processes of their own. Copies end as conversions do, when every file has reached the disk, and both start without
their source in the page cache. Before, between and after the conversions the same files are copied; each conversion is
compared with the copies of its own source beside it. Memory is the largest resident set of each process (VmHWM).
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.checkpoint.shards import plan_shards, shard_names, tensor_bytes
from megatron_vespo.checkpoint.tables import table_of

TOOLS = Path(__file__).resolve().parent.parent / "tools"
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
OTHERS = {
    "mbridge 0.15.1": "not measured: with Megatron-Core 0.16.1 and without Transformer Engine, get_model() ends in "
    "NameError: TENorm is not defined",
    "Megatron-Bridge 0.3.1": "not measured: importing it needs transformer_engine, which needs CUDA",
}
"""Converters that would have been measured, as tried on a CPU, 2026-11-21."""
SHARD_BYTES = 1000**3
SOURCE_SPREAD = 0.02


@dataclass
class Turn:
    what: str
    gigabytes: float
    seconds: float
    copy_of: str = ""
    peak_gigabytes: list[float] = field(default_factory=list)
    """Of each process of a conversion, the largest first."""

    @property
    def rate(self) -> float:
        return self.gigabytes / self.seconds


def write_model(folder: Path, layers: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_30B_A3B | {"num_hidden_layers": layers}))
    architecture = read_architecture(folder)
    shapes = table_of(architecture).hf_shapes(architecture)
    groups = plan_shards(tensor_bytes(shapes, torch.bfloat16), SHARD_BYTES)
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(SOURCE_SPREAD).bfloat16()
    placed = {}
    for file, names in zip(shard_names(len(groups)), groups, strict=True):
        shard = {}
        for name in names:
            size = torch.Size(shapes[name]).numel()
            start = hash_of_name(name) % len(noise)  # so that no two tensors are alike
            shard[name] = noise.roll(start).repeat(size // len(noise) + 1)[:size].view(shapes[name])
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def hash_of_name(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (2**61 - 1)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in files_of(folder)) / 1e9


def settle(folder: Path) -> None:
    """Everything on the disk, and nothing of `folder` in the page cache."""
    os.sync()
    for path in files_of(folder):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def copy(source: Path, target: Path, processes: int) -> Turn:
    """As many files at a time as a conversion has processes."""
    settle(source)
    begin = time.monotonic()
    target.mkdir()
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda path: copy_file(path, target / path.name), files_of(source)))
    seconds = time.monotonic() - begin
    turn = Turn("copy", gigabytes(source), seconds, copy_of=source.name)
    shutil.rmtree(target)
    return turn


def copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    file = os.open(target, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def converted(what: str, source: Path, command: list[str]) -> Turn:
    settle(source)
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for member in members(process.pid):
            peaks[member] = max(peaks.get(member, 0), peak_bytes(member))
        time.sleep(0.05)
    seconds = time.monotonic() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    ordered = sorted((peak / 1e9 for peak in peaks.values()), reverse=True)
    return Turn(what, gigabytes(source), seconds, peak_gigabytes=ordered)


def members(root: int) -> list[int]:
    try:
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=3, help="1.2 GB each, and 1.3 GB beside them")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write every measurement here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        turns = measure(Path(name), options)
    shares = report(turns)
    for name, reason in OTHERS.items():
        print(f"{name}: {reason}")
    if options.out:
        found = {
            "date": datetime.now(UTC).date().isoformat(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0],
            "versions": {"torch": importlib.metadata.version("torch")},
            "layers": options.layers,
            "workers": options.workers,
            "turns": [asdict(turn) for turn in turns],
            "share_of_copying": shares,
            "others": OTHERS,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> list[Turn]:
    hf, megatron, back, copied = (folder / name for name in ("hf", "megatron", "back", "copied"))
    write_model(hf, options.layers)
    workers = ["--workers", str(options.workers)]
    there_command = [str(TOOLS / "convert_hf_to_megatron.py"), "--hf", str(hf), "--out", str(megatron), *workers]
    back_command = [str(TOOLS / "convert_megatron_to_hf.py"), "--megatron", str(megatron), "--out", str(back), *workers]
    turns: list[Turn] = []

    def add(turn: Turn) -> None:
        turns.append(turn)
        peaks = "".join(f" {peak:.2f}" for peak in turn.peak_gigabytes)
        print(
            f"{turn.what:16} {turn.gigabytes:.2f} GB  {turn.seconds:6.1f} s  {turn.rate * 1000:5.0f} MB/s{peaks}",
            flush=True,
        )

    for _ in range(options.passes):
        add(copy(hf, copied, options.workers))
        add(converted("hf to megatron", hf, there_command))
        add(copy(hf, copied, options.workers))
        add(copy(megatron, copied, options.workers))
        add(converted("megatron to hf", megatron, back_command))
        add(copy(megatron, copied, options.workers))
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    return turns


def report(turns: list[Turn]) -> dict[str, list[float]]:
    """Rate of each conversion over the mean rate of the copies before and after it."""
    shares: dict[str, list[float]] = {}
    for number, turn in enumerate(turns):
        if turn.what != "copy":
            beside = statistics.mean(turns[other].rate for other in (number - 1, number + 1))
            shares.setdefault(turn.what, []).append(turn.rate / beside)
    for what, found in shares.items():
        peak = max(turn.peak_gigabytes[0] for turn in turns if turn.what == what)
        print(f"{what}: {statistics.median(found):.2f} of copying's rate, peak memory {peak:.2f} GB a process")
    return shares


if __name__ == "__main__":
    main()
