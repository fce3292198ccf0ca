"""What tests of layouts run in their ranks. Apart from the tests, so that ranks import no more than they need."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rank_models import joined, poisoned_model
from safetensors.torch import load_file

from megatron_vespo.architecture.hf_config import Architecture
from megatron_vespo.checkpoint.check import check_folder
from megatron_vespo.checkpoint.export import export_hf_folder
from megatron_vespo.checkpoint.gather import GatherPlan, gather_hf_tensors
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.policy.initialise import initialise

SEED = 7


@dataclass(frozen=True)
class Case:
    kind: str
    world_size: int
    layout: dict[str, int] = field(default_factory=dict)
    tied: bool = False
    vocabulary_multiple: int = 1

    @property
    def name(self) -> str:
        layout = "-".join(f"{axis}{size}" for axis, size in self.layout.items())
        return f"{self.kind}-{'tied' if self.tied else 'untied'}-{layout or 'one'}-of-{self.world_size}"

    @property
    def model(self) -> str:
        """Folder of the model, shared by cases."""
        return f"{self.kind}-{'tied' if self.tied else 'untied'}"


@dataclass
class Report:
    """Of one rank."""

    different: list[str]
    """Gathered tensors that are not the folder's."""
    order: list[str]
    doubled: list[str]
    """Gathered by `value` (twice the parameter, in float64), those that are not twice the folder's."""
    in_pieces: list[str]
    """Tensors that are other numbers when they are gathered in small pieces; rank 0 has all of them."""
    own_parts: dict[str, int]
    """Tensor -> how many numbers of it this rank has to give."""
    wrong_parts: list[str]
    """Tensors of which it gives other numbers, or to another place."""
    unwritten: list[str]
    """Parameters that are NaN somewhere after loading."""
    padding: dict[str, tuple[int, bool]]
    """Vocabulary parameter -> (its rows in this rank, whether those beyond the vocabulary are zero)."""
    initialised: str | None
    """Fingerprint of the random model, gathered; rank 0 only."""


def round_trip(rank: int, world_size: int, port: int, case: Case, root: str) -> Report:
    folder = Path(root) / case.model
    source = load_file(folder / "model.safetensors")
    architecture = check_folder(folder)
    with joined(rank, world_size, port, case.layout) as device:
        chunks = poisoned_model(architecture, device, case.layout, "float32", case.vocabulary_multiple)
        load_hf_weights(chunks, architecture, folder)
        gathered = {name: tensor.clone() for name, tensor in gather_hf_tensors(chunks, architecture)}
        doubled = dict(gather_hf_tensors(chunks, architecture, value=lambda p: p.detach().double() * 2))
        plan = GatherPlan(chunks, architecture, piece_elements=3000)
        in_pieces = {name: tensor.clone() for name, tensor in plan.tensors()}
        parts = [(name, cut, tensor.clone()) for name, cut, tensor in plan.own_parts()]
        export_hf_folder(chunks, architecture, folder, Path(root) / "export" / case.name)
        unwritten = [name for chunk in chunks for name, p in chunk.named_parameters() if p.isnan().any()]
        padding = _padding(chunks, architecture, rank, case.layout.get("tp", 1))
        initialise(chunks, architecture, SEED)
        initialised = fingerprint(dict(gather_hf_tensors(chunks, architecture)))
    return Report(
        different=[name for name, tensor in gathered.items() if not _equal(tensor, source[name])],
        order=list(gathered),
        doubled=[name for name, tensor in doubled.items() if not torch.equal(tensor, source[name].double() * 2)],
        in_pieces=[name for name in gathered if not _equal(in_pieces.pop(name), source[name])] + list(in_pieces),
        own_parts={name: sum(t.numel() for other, _, t in parts if other == name) for name, _, _ in parts},
        wrong_parts=[name for name, cut, tensor in parts if not torch.equal(tensor, source[name][cut])],
        unwritten=unwritten,
        padding=padding,
        initialised=initialised if rank == 0 else None,
    )


def _equal(found: torch.Tensor, source: torch.Tensor) -> bool:
    return found.dtype == source.dtype and found.is_contiguous() and torch.equal(found, source)


def _padding(chunks: list[Any], architecture: Architecture, rank: int, tp: int) -> dict[str, tuple[int, bool]]:
    """Tensor-parallel ranks are consecutive in Megatron's order of ranks."""
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(("embedding.", "output_layer.")):
                rows = parameter.shape[0]
                real = max(0, min(rows, architecture.vocab_size - (rank % tp) * rows))
                found[name] = (rows, not parameter[real:].any())
    return found


def gather_more_layers_than_there_are(rank: int, world_size: int, port: int, folder: str) -> str:
    """What is said when the pipeline stages together hold 4 layers of a model that should have 6."""
    architecture = check_folder(folder)
    layout = {"pp": 2}
    with joined(rank, world_size, port, layout) as device:
        chunks = poisoned_model(architecture, device, layout, "float32")
        try:
            list(gather_hf_tensors(chunks, replace(architecture, num_layers=6, moe_layers=(False,) * 6)))
        except RuntimeError as error:
            return str(error)
    return "nothing was said"


def initialised_fingerprint(rank: int, world_size: int, port: int, architecture: Architecture, dtype: str) -> str:
    """Of a random model's Megatron parameters by name."""
    with joined(rank, world_size, port, {}) as device:
        chunks = poisoned_model(architecture, device, {}, dtype)
        initialise(chunks, architecture, SEED)
        return fingerprint(dict(chunks[0].named_parameters()))


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
