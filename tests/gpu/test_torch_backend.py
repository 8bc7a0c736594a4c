"""Torch's own causal attention on a GPU, where the layout hides nothing. No emulator has its kernels."""

import pytest
import torch
from emulation import EMULATED
from plain_cases import check

from gistkern import backends
from gistkern.backends import plain

pytestmark = pytest.mark.skipif(EMULATED, reason="torch's CUDA kernels run on a GPU alone")


@pytest.fixture(autouse=True)
def not_reproducible(poison_and_seed):
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head_dim", [24, 64, 128, 192])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_computes_what_the_reference_does(dtype, kv_heads, head_dim, device):
    check(device, dtype=dtype, kv_heads=kv_heads, head_dim=head_dim, rows=333)
    check(device, dtype=dtype, kv_heads=kv_heads, head_dim=head_dim, strided=True)


@pytest.mark.parametrize("head_dim", [40, 64, 128, 192])
def test_what_the_table_lets_through_forms_no_matrix(head_dim, device):
    """Forward and backward of 16,384 rows, whose scores alone would be 2 GB a sample."""
    q, k, v = (torch.randn(1, heads, 16384, head_dim, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2))
    assert backends.choose("auto", q, gradient=True, plain=True) == "torch"
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plain.attend(*leaves, scale=0.1).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16384 * 16384
