"""What SGLang 0.5.23 needs to serve on a CPU without CUDA and without AMX. Nothing here is active where CUDA is.

Two moments: `prepare_imports` must run before anything of SGLang is imported, in each process of the server (the
launcher, megatron_vespo.rollout.serve, does it at its top level, which spawned processes execute again); `register` is
called by SGLang itself in each process, as a plugin of the entry point group `sglang.srt.plugins`.

| missing on CPU | provided by |
|---|---|
| `sgl_kernel`, the compiled kernels (AMX only) | a stand-in module: names that are imported but not reached raise |
| torchvision, imported for image models | modules whose functions raise (torchvision_stand_in) |
| host memory of the routed experts' cache (cudaHostRegister) | an allocator without registration |
| `sgl_kernel::murmur_hash32_cpu`, seeds of single samples | the same hash, in numpy |
| a deterministic attention backend | `torch_native`: it attends each sequence by itself |
| batch-invariant matrix products (Triton) | `aten::mm` in blocks of rows of one fixed size |
| room for the routed experts of a prefill batch that is not chunked (SGLang sizes the buffer by the chunk, which is -1 \
here, or by the running requests, and writes beyond it) | a buffer for the largest prefill batch |
"""

import functools
import importlib.machinery
import importlib.metadata
import sys
import types

import numpy as np
import torch

from megatron_vespo.rollout.torchvision_stand_in import provide_torchvision

SGLANG_VERSION = "0.5.23"
ROW_BLOCK = 16
"""Rows of one block in a batch-invariant product: small decode batches are not padded much, large ones stay fast."""

UNREACHED_KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
"""Speculative decoding and hierarchical caches: imported on every CPU start, called only where those are switched on."""


def needed() -> bool:
    """Whether this process would run SGLang on a CPU."""
    return not torch.cuda.is_available()


def check_version() -> None:
    """Raises RuntimeError where another SGLang is installed: every substitution here was read against one version."""
    found = importlib.metadata.version("sglang")
    if found != SGLANG_VERSION:
        raise RuntimeError(
            f"serving on a CPU is adapted to sglang=={SGLANG_VERSION}, found {found}: install that version, "
            "or check megatron_vespo/rollout/sglang_on_cpu.py against the new one"
        )


def prepare_imports() -> None:
    """Make SGLang importable. Before its first import, in every process of the server; does nothing with CUDA."""
    if not needed():
        return
    check_version()
    provide_torchvision()
    if "sgl_kernel" not in sys.modules:
        sys.modules["sgl_kernel"] = kernel_stand_in()


def kernel_stand_in() -> types.ModuleType:
    """A module `sgl_kernel` with the names that SGLang imports on a CPU."""
    module = types.ModuleType("sgl_kernel", "Stand-in for SGLang's compiled CPU kernels, which need AMX.")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None)
    functions = {name: functools.partial(_unreached, name) for name in UNREACHED_KERNELS}
    vars(module).update(functions, assign_req_to_token_pool_cpu=assign_req_to_token_pool)
    return module


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Write each request's new cache slots into its row of `req_to_token`, at its positions [start, end).

    Args:
        req_pool_indices, start, end: [requests].
        req_to_token: [rows, positions], written in place. `stride` is the length of a row.
        out_cache_loc: [sum of end - start], requests behind each other.
    """
    offset = 0
    for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        slots = out_cache_loc[offset : offset + last - first]
        req_to_token[row, first:last] = slots.to(req_to_token.dtype)
        offset += last - first


def _unreached(name: str, *_, **__):
    raise RuntimeError(f"sgl_kernel.{name} has no CPU implementation here: switch off the feature that calls it")


def register() -> None:
    """SGLang's plugin entry point."""
    if not needed():
        return
    check_version()
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_deterministic_attention_backend_choices(["torch_native"])
    declare_seeded_hash()
    batch_invariance = "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode"
    HookRegistry.register(batch_invariance, make_products_batch_invariant, HookType.REPLACE)
    allocation = "sglang.srt.mem_cache.pool_host.common.alloc_with_host_register"
    HookRegistry.register(allocation, allocate_plain, HookType.REPLACE)
    capturer = "sglang.srt.state_capturer.routed_experts.RoutedExpertsCapturer.__init__"
    HookRegistry.register(capturer, make_room_for_whole_prompts, HookType.AFTER)


def allocate_plain(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None) -> torch.Tensor:
    """Host memory that no GPU will read, so nothing to register. Arguments as SGLang passes them."""
    return torch.empty(dims, dtype=dtype, device=device)


def make_room_for_whole_prompts(_, capturer, model_config, *__, **___) -> None:
    """Let a RoutedExpertsCapturer hold the largest prefill batch: several prompts of up to max_prefill_tokens together,
    or a longer one by itself."""
    from sglang.srt.runtime_context import get_schedule

    cache = capturer.device_cache
    rows, *others = cache.buffer.shape
    rows = max(rows, get_schedule().max_prefill_tokens, model_config.context_len)
    cache.buffer = cache.buffer.new_zeros((rows, *others))


@functools.cache
def declare_seeded_hash() -> torch.library.Library:
    """Register `sgl_kernel::murmur_hash32_cpu` as SGLang's sampler calls it."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    return library


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bit, seed 0) of the 16 bytes (seed low, seed high, position, column).

    Equal to the Triton kernel sglang.kernels.ops.sampling.murmur_hash, whose arithmetic is in uint32.

    Args:
        seed: [n] uint64 or int64.
        positions: [n] integers.
        col_indices: [m] integers.

    Returns:
        [n, m] int64, values of 32 bits.
    """
    seeds = seed.view(torch.int64).numpy().view(np.uint64)
    rows = np.zeros(len(seeds), dtype=np.uint32)
    for word in (seeds, seeds >> np.uint64(32), positions.numpy()):
        rows = _mix(rows, word.astype(np.uint32))
    hashed = _mix(rows[:, None], col_indices.numpy().astype(np.uint32)[None, :])
    hashed ^= np.uint32(16)
    hashed ^= hashed >> np.uint32(16)
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> np.uint32(13)
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> np.uint32(16)
    return torch.from_numpy(hashed.astype(np.int64))


def _mix(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    word = word * np.uint32(0xCC9E2D51)
    word = (word << np.uint32(15)) | (word >> np.uint32(17))
    state = state ^ (word * np.uint32(0x1B873593))
    state = (state << np.uint32(13)) | (state >> np.uint32(19))
    return state * np.uint32(5) + np.uint32(0xE6546B64)


def make_products_batch_invariant(*_, **__) -> None:
    """Take the place of SGLang's `enable_batch_invariant_mode`, which it calls when asked for deterministic inference."""
    batch_invariant_library()


@functools.cache
def batch_invariant_library() -> torch.library.Library:
    """Override `aten::mm` on CPU in this process, for the rest of its life."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", mm_in_row_blocks, "CPU")
    return library


def mm_in_row_blocks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b such that a row of the result depends on that row of `a` alone, not on how many rows there are.

    BLAS picks another kernel, and so another order of additions, for another number of rows. Here every product has
    ROW_BLOCK rows, the last block filled up with zeros.

    Args:
        a: [m, k].
        b: [k, n].

    Returns:
        [m, n].
    """
    m, k = a.shape
    padding = -m % ROW_BLOCK
    if padding:
        a = torch.cat([a, a.new_zeros(padding, k)])
    blocks = (m + padding) // ROW_BLOCK
    product = torch.bmm(a.reshape(blocks, ROW_BLOCK, k), b.expand(blocks, *b.shape))
    return product.view(blocks * ROW_BLOCK, b.shape[1])[:m]
