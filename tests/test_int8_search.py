"""The int8 search finds exactly what scoring every key finds, whatever the keys are; it tells how many it scored."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from search_inputs import KINDS, make_keys

from unike_kernels import native, reference
from unike_kernels.indexing import KeptIndex
from unike_kernels.memory import ExternalMemory

if native.cpu() is None:
    pytest.skip(f"no CPU module: {native.no_cpu()}", allow_module_level=True)


@pytest.mark.parametrize("level", native.LEVELS)
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 300),
    d=st.sampled_from([1, 5, 63, 64, 100, 160, 224]),
    k=st.integers(0, 40),
    t=st.integers(0, 4),
    dtype=st.sampled_from(native.INDEXED),
    query=st.sampled_from(["random", "a key", "zero", "nan", "inf"]),
    limited=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_finds_what_scoring_every_key_finds(level, kind, n, d, k, t, dtype, query, limited, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = make_keys(kind, n, d, dtype, generator)
    q = torch.randn(t, d, generator=generator)
    if query == "a key":
        q = keys[torch.randint(0, n, (t,), generator=generator)].float()
    elif query != "random":
        q[:1] = 0.0 if query == "zero" else float(query)
    ranges = None
    if limited:
        ranges = torch.randint(-3, n + 4, (t, 2), generator=generator).sort(dim=1).values
    index = native.Int8Index(keys, level=level)
    scores, indices = index.search(q, k, ranges)
    # Where k is at least half of the keys every key is scored: the oracle, to the last bit.
    all_scores, all_indices = native.Int8Index(keys, level=level).search(q, n + k, ranges)
    assert torch.equal(scores, all_scores[:, :k]) and torch.equal(indices, all_indices[:, :k])

    # And the oracle is the reference in float64, but for the rounding of a sum of d products of fp32.
    wide = None if ranges is None else ranges
    norm = torch.linalg.vector_norm(keys.float(), dim=1).double()
    expected, _ = reference.cosine_topk(q.double(), keys.double(), n + k, key_norm=norm, ranges=wide)
    # Each sum has at most d + 2 roundings, of terms whose magnitudes add up to |q| |key| / |q| |key| = 1 at most.
    torch.testing.assert_close(all_scores.double(), expected, rtol=0, atol=(d + 8) * 2**-24)
    unit = reference._unit(q.double())
    for row in range(t):
        found = all_indices[row][all_indices[row] >= 0]
        assert len(found.unique()) == len(found)
        cosine = reference._over_norm(keys[found].double() @ unit[row], norm[found])
        torch.testing.assert_close(
            cosine, all_scores[row, : len(found)].double(), rtol=0, atol=(d + 8) * 2**-24, equal_nan=True
        )


def test_among_equal_scores_the_lowest_index_wins():
    keys = torch.randn(5, 96)[torch.arange(500) % 5] * 2.0 ** (torch.arange(500)[:, None] % 3)
    scores, indices = native.Int8Index(keys).search(keys[2:3], 6)
    assert indices.tolist() == [[2, 7, 12, 17, 22, 27]] and scores.unique().numel() == 1


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("kind", ["spread", "outliers"])
@pytest.mark.parametrize("d", [256, 320, 448])  # powers of two, and what needs two windows, as 2560 and 3584 do
def test_few_keys_are_scored_where_keys_are_spread(kind, d, level):
    generator = torch.Generator().manual_seed(1)
    keys = make_keys(kind, 4000, d, torch.float32, generator)
    index = native.Int8Index(keys, level=level)
    index.search(torch.randn(8, d, generator=generator), 20)
    assert (index.reranked >= 20).all() and index.reranked.float().mean() < 400
    assert index.bytes < 0.4 * keys.numel() * 4


def test_near_identical_keys_are_all_scored_and_the_scan_is_left_out():
    generator = torch.Generator().manual_seed(2)
    keys = make_keys("near-identical", 2000, 128, torch.float32, generator)
    index = native.Int8Index(keys)
    far = keys[:1].repeat(8, 1)
    for _ in range(6):
        index.search(far + 10 * torch.randn(8, 128, generator=generator), 5)
        expected = native.Int8Index(keys).search(far, 2000)[1][:, :5]
        assert torch.equal(index.search(far, 5)[1], expected)
    keys[:10] = torch.randn(10, 128, generator=generator)
    spread = native.Int8Index(keys)
    spread.search(keys[:1], 5)
    assert spread.reranked.tolist()[0] >= 5


def test_the_default_device_is_none_of_its_business():
    keys, q = torch.randn(2000, 16), torch.randn(2, 16)
    index = native.Int8Index(keys)
    expected = index.search(q, 3)
    with torch.device("meta"):
        found = index.search(q, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and index.reranked.is_cpu


def test_threads_do_not_change_the_result():
    generator = torch.Generator().manual_seed(3)
    keys, q = torch.randn(9000, 512, generator=generator), torch.randn(3, 512, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.Int8Index(keys).search(q, 50))
    finally:
        torch.set_num_threads(before)
    for scores, indices in results[1:]:
        assert torch.equal(scores, results[0][0]) and torch.equal(indices, results[0][1])


def test_another_search_meanwhile_leaves_what_is_written_in_place():
    """As another thread's does while C++ writes without the interpreter's lock."""
    index = native.Int8Index(torch.randn(600, 64))
    q, inner = torch.randn(4, 64), index._index
    index.search(q, 5)
    expected = index.reranked.clone()

    class Interrupted:
        def search(self, *args):
            index._index = inner
            index.search(q[:1], 9)
            kept = [torch.full((4,), -7) for _ in range(8)]  # where something was freed
            inner.search(*args)
            assert all((t == -7).all() for t in kept)

    index._index = Interrupted()
    index.search(q, 5)
    assert torch.equal(index.reranked, expected)


def test_strided_keys_given_norms_and_what_is_refused():
    table = torch.randn(600, 90)
    keys = table[::2, 10:74]
    ones = torch.ones(300)
    scores, indices = native.Int8Index(keys, ones).search(keys[:2], 4)
    expected = reference.cosine_topk(keys[:2], keys, 4, key_norm=ones)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])
    index = native.Int8Index(keys)
    for q, ranges in ((keys[:2, :5], None), (keys[:2].double(), None), (keys[:2], torch.zeros(1, 2).long())):
        with pytest.raises(ValueError, match="must be"):
            index.search(q, 3, ranges)
    for wrong in (keys.double(), keys[0], keys.to("meta")):
        with pytest.raises(ValueError, match="keys must be"):
            native.Int8Index(wrong)
    with pytest.raises(ValueError, match=r"key_norm must be \[300\]"):
        native.Int8Index(keys, torch.ones(3))


@pytest.fixture
def memory(monkeypatch) -> ExternalMemory:
    monkeypatch.setattr(KeptIndex, "WAIT", 2)
    sem = torch.randn(1500, 64, generator=torch.Generator().manual_seed(4))
    return ExternalMemory(sem, sem, sem, 1200, capacity=1600)


def count_searches(monkeypatch) -> list[int]:
    calls, search = [], native.Int8Index.search
    monkeypatch.setattr(native.Int8Index, "search", lambda self, *args: calls.append(1) or search(self, *args))
    return calls


def test_a_memory_searches_its_index_and_follows_every_change(memory, monkeypatch):
    calls = count_searches(monkeypatch)
    q = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))

    def check(selected=None):
        for _ in range(3):
            found = memory.search(q, 7, selected)
            memory.choose("reference")
            expected = memory.search(q, 7, selected)
            memory.choose("auto")
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[0], expected[0])

    for change in (
        lambda: None,
        lambda: memory.sem.__setitem__(int(memory.search(q, 1)[1]), float("nan")),
        lambda: memory.load(
            memory.sem[5:1300].clone(), memory.keys[5:1300].clone(), memory.values[5:1300].clone(), 900
        ),
        lambda: memory.to(torch.bfloat16),
        lambda: memory.sem_norm.mul_(torch.linspace(1, 2, 1600)),
    ):
        change()
        before = len(calls)
        check()
        assert len(calls) == before + 2  # from the second search of unchanged items on
        check(torch.tensor([[3, -1]]))
    twin = copy.deepcopy(memory)
    assert torch.equal(twin.search(q, 7)[1], memory.search(q, 7)[1])


def test_a_memory_leaves_the_index_alone_where_it_does_not_pay(memory, monkeypatch):
    calls = count_searches(monkeypatch)
    for _ in range(4):
        memory.search(torch.randn(2, 64), 3)  # more queries than pay at this size
        memory.search(torch.randn(1, 64, dtype=torch.float64), 3)
        torch.compile(memory.search, fullgraph=True, backend="eager")(torch.randn(1, 64), 3)
    monkeypatch.setattr(native, "cpu", lambda: None)
    for _ in range(4):
        assert (memory.search(torch.randn(1, 64), 3)[1] >= 0).all()
    assert calls == []


@pytest.mark.parametrize("avx512", [True, False])
def test_where_it_pays_depends_on_dtype_and_queries(avx512, monkeypatch):
    """Half-precision keys are searched by more than two queries faster than any copy, where AVX-512 widens them."""
    monkeypatch.setattr(native.cpu(), "avx512", avx512)
    monkeypatch.setattr(KeptIndex, "WAIT", 1)
    found = {}
    for dtype in native.INDEXED:
        sem = torch.randn(8192, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
        memory = ExternalMemory(sem, sem, sem, 8192)
        calls = count_searches(monkeypatch)
        for queries in (1, 2, 3, 8, 9):
            before = len(calls)
            memory.search(torch.randn(queries, 64).to(dtype), 7)
            if len(calls) > before:
                found.setdefault(dtype, []).append(queries)
    few = [1, 2] if avx512 else [1, 2, 3, 8]
    assert found == {torch.float32: [1, 2, 3, 8], torch.bfloat16: few, torch.float16: few}
