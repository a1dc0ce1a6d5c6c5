"""The search of the CPU's native code: torch's product tile by tile, the best of each tile kept."""

import pytest
import torch
from kernel_tools import DEVICE, poisoned
from topk_bodies import CosineTopk

from unike_kernels import cpu_kernels, native, ops, reference

if native.cpu() is None:
    pytest.skip(f"no CPU module: {native.no_cpu()}", allow_module_level=True)
if DEVICE.type != "cpu":
    pytest.skip("the shared inputs lie on the GPU", allow_module_level=True)


class TestCpu(CosineTopk):
    backend = "cpu"

    @pytest.fixture(autouse=True, params=[64, cpu_kernels.TILE], ids=["tiles", "tile"])
    def tile(self, request, monkeypatch):
        """Several tiles where there are more than 64 keys, and one."""
        monkeypatch.setattr(cpu_kernels, "TILE", request.param)

    def found(self, q, keys, k, **options):
        with poisoned(cpu_kernels):
            return ops.cosine_topk(q, keys, k, **options, backend=self.backend)


def test_auto_takes_it_and_the_rest_is_the_reference(monkeypatch):
    called = []
    real = cpu_kernels.cosine_topk
    monkeypatch.setattr(cpu_kernels, "cosine_topk", lambda *args: called.append(len(args[1])) or real(*args))
    q, keys = torch.randn(2, 8), torch.randn(9, 8)
    ops.cosine_topk(q, keys, 3)
    assert called == [9]
    ops.cosine_topk(q, keys, 3, backend="reference")
    scores, _ = ops.cosine_topk(q.double(), keys.double(), 3)  # the native code knows no float64
    assert called == [9] and torch.equal(scores, reference.cosine_topk(q.double(), keys.double(), 3)[0])


def test_autocast_rounds_no_product():
    q, keys = torch.randn(3, 64), torch.randn(50, 64)
    expected = ops.cosine_topk(q, keys, 5, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.cosine_topk(q, keys, 5, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_many_more_items_than_are_compared_at_a_time():
    """Chunks of 256 with a better score at either end of each."""
    keys = torch.zeros(2000, 4)
    keys[:, 0], keys[:, 1] = 1.0, 5.0
    for n, row in enumerate((0, 255, 256, 511, 512, 1999)):
        keys[row, 1] = 1.0 + n
    scores, indices = ops.cosine_topk(torch.tensor([[1.0, 0, 0, 0]]), keys, 5, backend="cpu")
    assert indices.tolist() == [[0, 255, 256, 511, 1]]  # 512 has what all the others have
    assert scores.tolist() == [sorted(scores[0].tolist(), reverse=True)]
