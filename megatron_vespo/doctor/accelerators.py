"""GPUs, and the libraries that only they use."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_vespo.doctor.finding import Finding
from megatron_vespo.doctor.probe import run_probe

TORCH = """
import torch
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if cuda else []
report(
    version=torch.__version__,
    build=torch.version.cuda,
    devices=[[device.name, device.total_memory, device.major, device.minor] for device in devices],
    nccl=list(torch.cuda.nccl.version()) if cuda else None,
)
"""
ONLY_ON_GPUS = "nothing here: it is for GPUs"


def driver_gpus() -> list[str]:
    """ "name, driver version" of each GPU that the driver shows; none where there is no driver or it does not answer."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def check_torch(gpus: list[str], seconds: float) -> list[Finding]:
    """torch imports; what it sees of the GPUs that the driver shows; and the NCCL that it brings."""
    probe = run_probe(TORCH, seconds)
    if not probe.ok:
        mend = f"{sys.executable} -m pip install --force-reinstall --no-deps $(grep '^torch==' requirements/{{}}.lock)"
        mend = mend.format("cuda" if gpus else "cpu")
        return [Finding("import torch", "failed", probe.error, "torch", "nothing trains or samples", mend)]
    return [Finding("import torch", "ok", f"{probe.values['version']} imports"), *seen_by_torch(gpus, probe.values)]


def seen_by_torch(gpus: list[str], values: dict[str, Any]) -> list[Finding]:
    """`values`: what `TORCH` reports."""
    devices, build = values["devices"], values["build"]
    if not devices and not gpus:
        cost = "everything runs on the CPU: tiny models, and every test"
        return [
            Finding("CUDA", "note", "no GPU", "", cost),
            Finding("NCCL", "note", "not used: ranks talk over gloo"),
        ]
    if not devices:
        why = (
            "its build has no CUDA" if build is None else f"its CUDA {build} can't use them (driver too old, or hidden)"
        )
        mend = f"{sys.executable} -m pip install --no-deps -r requirements/cuda.lock"
        hidden = "; check CUDA_VISIBLE_DEVICES" if build is not None else ""
        found = f"the driver shows {len(gpus)} GPUs ({gpus[0]}), torch sees none: {why}"
        return [Finding("CUDA", "failed", found, "a torch that sees them", "trains on the CPU", mend + hidden)]
    name, memory, major, minor = devices[0]
    found = f"{len(devices)} x {name}, {memory / 2**30:.0f} GiB, capability {major}.{minor}, CUDA {build}"
    nccl = Finding("NCCL", "ok", ".".join(map(str, values["nccl"])))
    if major < 8:
        return [Finding("CUDA", "failed", found, "capability 8.0 or later", "no bfloat16", "use other GPUs"), nccl]
    return [Finding("CUDA", "ok", found), nccl]


def check_transformer_engine(has_gpu: bool, seconds: float) -> Finding:
    cost = "Megatron's own layers: experts one by one instead of grouped, attention without its kernels, no ring for cp > 1"
    part = "$(sed -n 's/^transformer-engine==/transformer-engine-torch==/p' requirements/cuda.lock)"
    mend = f"{sys.executable} -m pip install --no-build-isolation --no-deps {part}"
    return _optional("Transformer Engine", "transformer_engine.pytorch", cost, mend, has_gpu, seconds)


def check_apex(has_gpu: bool, seconds: float) -> Finding:
    cost = "weight gradients are added to the fp32 buffer in a kernel of their own: more memory traffic in backward"
    mend = (
        'APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation --config-settings "--build-option='
        '--fused_weight_gradient_mlp" . , in a copy of NVIDIA Apex'
    )
    return _optional("Apex", "fused_weight_gradient_mlp_cuda", cost, mend, has_gpu, seconds)


def check_deep_ep(has_gpu: bool, seconds: float, *, wanted: bool) -> Finding:
    cost = "policy.token_dispatcher: flex can't be used (alltoall can)"
    mend = f"{sys.executable} -m pip install --no-deps $(grep '^sgl-deep-ep==' requirements/cuda.lock)"
    finding = _optional("DeepEP", "deep_ep", cost, mend, has_gpu, seconds)
    if wanted and finding.status != "ok":
        return Finding("DeepEP", "failed", finding.found, "deep_ep, of token_dispatcher: flex", cost, mend)
    return finding if finding.status != "warning" else Finding("DeepEP", "note", finding.found, "", cost, mend)


def _optional(name: str, module: str, cost: str, mend: str, has_gpu: bool, seconds: float) -> Finding:
    if find_spec(module.split(".")[0]) is None:
        if not has_gpu:
            return Finding(name, "note", "not installed", "", ONLY_ON_GPUS)
        return Finding(name, "warning", "not installed", module, cost, mend)
    probe = run_probe(f"import torch\nimport {module}\nreport()", seconds)
    if probe.ok:
        return Finding(name, "ok", f"{module} imports")
    if not has_gpu:
        return Finding(name, "note", f"installed, and does not import: {probe.error}", "", ONLY_ON_GPUS)
    # A package that is there and broken is worse than none: what asks whether it is there believes it.
    return Finding(name, "failed", f"installed, and does not import: {probe.error}", module, cost, mend)


def check_infiniband(has_gpu: bool, folder: Path = Path("/sys/class/infiniband")) -> Finding:
    """Ports that are up, with their rates. `folder`: where the kernel lists adapters."""
    ports = sorted(folder.glob("*/ports/*")) if folder.is_dir() else []
    states = {port: _first_line(port / "state") for port in ports}
    up = [port for port, state in states.items() if "ACTIVE" in state]
    if up:
        rates = [f"{port.parent.parent.name}:{port.name} {_first_line(port / 'rate')}" for port in up]
        found = f"{len(up)} of {len(ports)} ports are up: {', '.join(rates)}"
        if len(up) == len(ports):
            return Finding("InfiniBand", "ok", found)
        down = ", ".join(f"{p.parent.parent.name}:{p.name} ({s})" for p, s in states.items() if p not in up)
        return Finding("InfiniBand", "warning", found, f"down: {down}", "NCCL has fewer links", "ibstat; ask the site")
    found = f"{len(ports)} ports, none up" if ports else "no adapter"
    if not has_gpu and not ports:
        return Finding("InfiniBand", "note", found, "", "nothing on one host, or where nodes talk over TCP anyway")
    cost = "NCCL between hosts goes over TCP, an order of magnitude slower; one host is not concerned"
    return Finding(
        "InfiniBand", "warning", found, "a port that is up", cost, "ibstat; in a container pass /dev/infiniband"
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        return f"unreadable ({error.strerror})"
