"""Weights through a folder that trainer and engines both see: one safetensors file a bucket, removed once it was loaded."""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_vespo.checkpoint.manifest import hash_of
from megatron_vespo.checkpoint.safetensors_stream import RowWriter
from megatron_vespo.weights.buckets import Bucket, TensorSpec, tensors_in
from megatron_vespo.weights.sender import Sender


class DiskSender(Sender):
    """Engines load each bucket's folder by `/update_weights_from_disk`, which takes a part of a model as well as all."""

    def __init__(self, buckets: Sequence[Bucket], device: torch.device, folder: Path, changed_only: bool) -> None:
        """`changed_only`: leave out what is as it was when the engines got their weights."""
        super().__init__(buckets, device)
        self._folder = folder
        self._changed_only = changed_only
        self._changes: dict[str, tuple[str, int]] = {}
        """Of each tensor: hash, and the first weight version that had it."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="weights to disk")
        self._written: dict[int, Future[Path | None]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> None:
        self._remove(index - 2)
        self._written[index] = self._writer.submit(self._write, index, slot, weight_version, since)

    def describe(self, index: int, copies: int) -> str | None:
        """The bucket's folder; None if nothing of it has changed."""
        folder = self._written[index].result()
        return None if folder is None else str(folder)

    def take(self, index: int, copies: int, released: int) -> str | None:
        if released == len(self.buckets):
            self._remove(released - 2)
            self._remove(released - 1)
        return super().take(index, copies, released)

    def close(self) -> None:
        self._writer.shutdown(cancel_futures=True)
        for index in list(self._written):
            self._remove(index)

    def _write(self, index: int, slot: torch.Tensor, weight_version: int, since: int | None) -> Path | None:
        tensors = tensors_in(self.buckets[index], slot.cpu())
        if self._changed_only:
            last = tensors[-1:] if index == len(self.buckets) - 1 else []  # with it, the engine learns its new version
            tensors = [one for one in tensors if self._has_changed(*one, weight_version, since)] or last
        if not tensors:
            return None
        folder = self._folder / f"bucket_{index:05d}"
        folder.mkdir(exist_ok=True)
        shapes = {spec.name: (spec.shape, tensor.dtype) for spec, tensor in tensors}
        with (folder / "model.safetensors").open("wb") as file:
            writer = RowWriter(file, shapes)
            for _, tensor in tensors:
                writer.write(tensor)
        return folder

    def _has_changed(self, spec: TensorSpec, tensor: torch.Tensor, weight_version: int, since: int | None) -> bool:
        found = hash_of(tensor)
        known = self._changes.get(spec.name)
        if known is None or known[0] != found:
            known = self._changes[spec.name] = (found, weight_version)
        return since is None or known[1] > since

    def _remove(self, index: int) -> None:
        written = self._written.pop(index, None)
        if written is None or written.cancelled() or written.exception() is not None:
            return
        if (folder := written.result()) is not None:
            shutil.rmtree(folder)
