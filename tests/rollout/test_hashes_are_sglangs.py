"""Against SGLang's own code: its Triton kernels, run by Triton's interpreter, and its Python functions."""

import subprocess
import sys

import pytest

COMPARE = """
import os
os.environ |= {"TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1"}
import torch, triton
from megatron_vespo.rollout import fused_checksums, sglang_on_cpu
sglang_on_cpu.prepare_imports()
from sglang.kernels.ops.memory import gpu_tensor_hash as kernels
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel
from sglang.srt.managers.mm_utils import tensor_hash


def kernel_hash(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = torch.cat([data, data.new_zeros(-len(data) % 4)]).view(torch.uint32)
    seed = 0x243F6A88
    sums = torch.empty(triton.cdiv(len(words), 8192), dtype=torch.uint64)
    kernels.hash_tiles32_kernel_blocked[(len(sums),)](
        words, sums, len(words), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=kernels.FMIX32_C1, FM_C2=kernels.FMIX32_C2, POS_A=kernels.POS_C1, POS_B=kernels.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=False,
    )
    while len(sums) > 1:
        following = torch.empty(triton.cdiv(len(sums), 1024), dtype=torch.uint64)
        kernels.add_tree_reduce_u64_kernel[(len(following),)](sums, following, len(sums), CHUNK=1024)
        sums = following
    return kernels._final_splitmix64(int(sums.item()))


torch.manual_seed(0)
for shape, dtype in [((3, 7), torch.float32), ((5, 3), torch.bfloat16), ((130, 77), torch.bfloat16), ((150, 129), torch.float32)]:
    tensor = torch.randn(shape).to(dtype)
    assert kernel_hash(tensor) == fused_checksums.tile_hash(tensor), (shape, dtype)
    assert tensor_hash(tensor) == fused_checksums.sha256_hash([tensor]), (shape, dtype)

seeds = torch.tensor([0, 1, 2**62 + 12345, 2**63 - 1])
positions, columns = torch.tensor([0, 5, 100_000, 3]), torch.arange(1100)
hashed = torch.empty(4, 1100, dtype=torch.uint32)
murmur_hash32_kernel[(4, 2)](seeds, positions, columns, hashed, 4, 1100, BLOCK_SIZE=1024)
assert torch.equal(sglang_on_cpu.murmur_hash32(seeds.view(torch.uint64), positions, columns), hashed.to(torch.int64))
"""


@pytest.mark.engine
def test_checksums_and_noise_are_sglangs():
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
