"""The search of the CPU's native code: one pass over the keys, or torch's product tile by tile; the best are kept."""

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

    @pytest.fixture(autouse=True, params=["best", "avx2", "tiles", "tile"])
    def how(self, request, monkeypatch):
        """One pass, in two levels of instructions; or torch's product: several tiles for more than 64 keys, and one."""
        if request.param in native.LEVELS:
            monkeypatch.setattr(cpu_kernels, "LEVEL", request.param)
        else:
            monkeypatch.setattr(cpu_kernels, "MOST_SCANNED_QUERIES", 0)
            monkeypatch.setattr(cpu_kernels, "TILE", 64 if request.param == "tiles" else cpu_kernels.TILE)

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


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 7, 33, 96, 200])
def test_any_width_and_number_of_queries(d, dtype, level, monkeypatch):
    """Registers that are not full, queries that are not a multiple of four, keys with a stride, ranges, two threads."""
    monkeypatch.setattr(cpu_kernels, "LEVEL", level)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    generator = torch.Generator().manual_seed(d)
    for queries, n in ((1, 700), (3, 259), (6, 1100), (13, 40)):
        keys = torch.randn(n, d + 3, generator=generator).to(dtype)[:, :d]
        keys[n // 2] = keys[3]  # equal: the lower index first
        keys[5] = 0
        q = torch.randn(queries, d, generator=generator).to(dtype)
        q[0] = keys[3]
        ranges = torch.randint(-2, n + 2, (queries, 2), generator=generator).sort(dim=1).values
        for options in ({}, {"ranges": ranges}):
            scores, indices = ops.cosine_topk(q, keys, 20, backend="cpu", **options)
            expected, _ = ops.cosine_topk(q.double(), keys.double(), 20, backend="reference", **options)
            torch.testing.assert_close(scores.double(), expected, rtol=0, atol=(d + 8) * 2**-24)
            unit = torch.nn.functional.normalize(q.double(), dim=1)
            at = keys.double()[indices.clamp(min=0)]
            cosine = (unit[:, None] * at).sum(-1) / torch.linalg.vector_norm(at, dim=-1).clamp(min=1e-300)
            there = indices >= 0
            torch.testing.assert_close(scores.double()[there], cosine[there], rtol=0, atol=(d + 8) * 2**-24)
            assert all(len(row[row >= 0].unique()) == int((row >= 0).sum()) for row in indices)


@pytest.mark.parametrize("level", native.LEVELS[1:])
@pytest.mark.parametrize("queries", [3, 4, 9])
def test_equal_keys_are_equal_whoever_else_looks_at_them(queries, level, monkeypatch):
    """A query meets some keys alone and some together with others; the order of its sums is the same for all."""
    monkeypatch.setattr(cpu_kernels, "LEVEL", level)
    generator = torch.Generator().manual_seed(queries)
    one, q = torch.randn(200, generator=generator), torch.randn(queries, 200, generator=generator)
    keys = one.repeat(1030, 1)
    ends = torch.full((queries,), 1030)
    ranges = torch.stack([torch.arange(queries) * 120, ends], dim=1)  # the first sees the first keys alone
    scores, indices = ops.cosine_topk(q, keys, 300, ranges=ranges, backend="cpu")
    assert (scores.isfinite() <= (scores == scores[:, :1])).all()
    count = (ends - ranges[:, 0]).clamp(max=300)
    for row, (start, some) in enumerate(zip(ranges[:, 0].tolist(), count.tolist(), strict=True)):
        assert indices[row, :some].tolist() == list(range(start, start + some))


def test_keys_and_queries_at_the_ends_of_bfloat16():
    """The units for bfloat16 take subnormal numbers for zero: such sums, and those that overflow, are left to fp32."""
    d, smallest = 64, 2.0**-133
    keys = torch.randn(12, d)
    keys[1] *= smallest  # all subnormal
    keys[2] *= 1e-36
    keys[3] *= 1e37
    keys[4] = 0
    keys[5, 3] = float("inf")
    keys[6, 3] = float("nan")
    keys = keys.bfloat16()
    norm = torch.linalg.vector_norm(keys.double(), dim=1).float()
    for size in (1.0, 1e-18, 1e18):  # fp32 finds no length beyond
        q = (torch.randn(5, d).clamp(-2, 2) * size).bfloat16()
        q[1, 2] = float("nan")
        scores, indices = ops.cosine_topk(q, keys, 12, key_norm=norm, backend="cpu")
        expected, _ = ops.cosine_topk(q.double(), keys.double(), 12, key_norm=norm.double(), backend="reference")
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
        assert set(indices[0].tolist()) == {-1, *range(12)} - {5, 6} and indices[1].tolist() == [-1] * 12
