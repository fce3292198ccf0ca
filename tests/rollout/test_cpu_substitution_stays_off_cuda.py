import subprocess
import sys

import pytest
import torch

from megatron_vespo.rollout import sglang_on_cpu

WITH_CUDA = """
import sys, torch
torch.cuda.is_available = lambda: True
from megatron_vespo.rollout import sglang_on_cpu
import megatron_vespo.rollout.serve
sglang_on_cpu.prepare_imports()
sglang_on_cpu.register()
assert "sgl_kernel" not in sys.modules
assert not any(name.startswith("sglang") for name in sys.modules), "nothing of SGLang was touched"
assert not any("torchvision" in type(finder).__module__ for finder in sys.meta_path)
assert sglang_on_cpu.declare_seeded_hash.cache_info().currsize == 0
assert sglang_on_cpu.batch_invariant_library.cache_info().currsize == 0
"""

WITHOUT_DETERMINISM = """
import torch
from megatron_vespo.rollout import sglang_on_cpu
sglang_on_cpu.prepare_imports()
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
assert len(HookRegistry._patched) == 3, HookRegistry._patched
import sglang.srt.batch_invariant_ops as operators
from sglang.srt.arg_groups.choices import DETERMINISTIC_ATTENTION_BACKEND_CHOICES
assert "torch_native" in DETERMINISTIC_ATTENTION_BACKEND_CHOICES
torch.manual_seed(0)
a, b = torch.randn(33, 64), torch.randn(64, 48)
stock = a @ b
assert sglang_on_cpu.batch_invariant_library.cache_info().currsize == 0
operators.enable_batch_invariant_mode()
assert sglang_on_cpu.batch_invariant_library.cache_info().currsize == 1
torch.testing.assert_close(a @ b, stock)
assert torch.equal(a @ b, sglang_on_cpu.mm_in_row_blocks(a, b))
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nothing_is_installed_where_cuda_is():
    run(WITH_CUDA)


@pytest.mark.engine
def test_products_change_only_when_determinism_is_asked_for():
    run(WITHOUT_DETERMINISM)


def test_another_sglang_is_refused(monkeypatch):
    monkeypatch.setattr(sglang_on_cpu, "SGLANG_VERSION", "0.0.1")
    with pytest.raises(RuntimeError, match=r"adapted to sglang==0\.0\.1, found"):
        sglang_on_cpu.check_version()


def test_a_row_of_a_product_depends_on_that_row_alone():
    mm_in_row_blocks = sglang_on_cpu.mm_in_row_blocks
    torch.manual_seed(0)
    a, b = torch.randn(150, 64), torch.randn(64, 320)
    whole = mm_in_row_blocks(a, b)
    torch.testing.assert_close(whole, a @ b)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20), slice(16, 150)):
        assert torch.equal(mm_in_row_blocks(a[rows], b), whole[rows])
    transposed = b.T.contiguous().T
    assert torch.equal(mm_in_row_blocks(a[30:33], transposed), mm_in_row_blocks(a, transposed)[30:33])
    assert mm_in_row_blocks(a[:0], b).shape == (0, 320)
