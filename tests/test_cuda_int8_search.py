"""The int8 search on a GPU finds exactly what scoring every key finds; where there is none, on the emulator."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_tools import DEVICE, launches, on_cuda, poisoned
from search_inputs import KINDS, make_keys

from unike_kernels import native, reference
from unike_kernels.cuda_kernels.int8_search import CudaInt8Index

EMULATED = DEVICE.type == "cpu"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    on_cuda(monkeypatch)


def search(index, q, k, ranges=None):
    with poisoned(), launches() as started:
        found = index.search(q, k, ranges)
    if len(q) and k:
        names = ["prepare", "scan", "bound", "rerank"] if len(index.keys) else ["prepare"]
        assert started == {**{f"int8_search_{name}": 1 for name in names}, "cosine_topk_select": 1}
    return found


def all_scored(keys):
    """The oracle: an index that knows nothing of its keys."""
    index = CudaInt8Index(keys)
    index.residual.fill_(float("inf"))
    return index


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    n=st.integers(0, 700),
    d=st.sampled_from([1, 5, 63, 64, 100, 160, 224, 1100]),
    k=st.integers(0, 40),
    t=st.sampled_from([0, 1, 2, 4, 5, 8, 9, 16]),
    dtype=st.sampled_from(native.INDEXED),
    query=st.sampled_from(["random", "a key", "zero", "nan", "inf"]),
    limited=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_finds_what_scoring_every_key_finds(kind, n, d, k, t, dtype, query, limited, seed):
    if EMULATED:
        import emulator

        emulator.seed(seed)
    generator = torch.Generator().manual_seed(seed)
    keys = make_keys(kind, n, d, dtype, generator)
    q = torch.randn(t, d, generator=generator)
    if query == "a key" and n:
        q = keys[torch.randint(0, n, (t,), generator=generator)].float()
    elif query not in ("random", "a key"):
        q[:1] = 0.0 if query == "zero" else float(query)
    keys, q = keys.to(DEVICE), q.to(DEVICE)
    ranges = None
    if limited:
        ranges = torch.randint(-3, n + 4, (t, 2), generator=generator).sort(dim=1).values.to(DEVICE)
    index = CudaInt8Index(keys)
    scores, indices = search(index, q, k, ranges)
    oracle = all_scored(keys)
    all_scores, all_indices = search(oracle, q, k, ranges)
    assert torch.equal(scores, all_scores) and torch.equal(indices, all_indices)
    if t and k:
        assert (index.reranked <= oracle.reranked).all() and (index.reranked >= (indices >= 0).sum(dim=1)).all()

    # And the oracle is the reference in float64, but for the rounding of a sum of d products of fp32.
    norm = torch.linalg.vector_norm(keys.float(), dim=1).double()
    expected, _ = reference.cosine_topk(q.double(), keys.double(), k, key_norm=norm, ranges=ranges)
    torch.testing.assert_close(all_scores.double(), expected, rtol=0, atol=(d + 8) * 2**-24)
    unit = reference._unit(q.double())
    for row in range(t if k else 0):
        found = all_indices[row][all_indices[row] >= 0]
        assert len(found.unique()) == len(found)
        cosine = reference._over_norm(keys[found].double() @ unit[row], norm[found])
        torch.testing.assert_close(cosine, all_scores[row, : len(found)].double(), rtol=0, atol=(d + 8) * 2**-24)


@pytest.mark.parametrize("kind", ["spread", "outliers"])
@pytest.mark.parametrize("d", [256, 320, 448])  # powers of two, and what needs two windows, as 2560 and 3584 do
def test_few_keys_are_scored_where_keys_are_spread(kind, d):
    generator = torch.Generator().manual_seed(1)
    keys = make_keys(kind, 4000, d, torch.bfloat16, generator).to(DEVICE)
    index = CudaInt8Index(keys)
    search(index, torch.randn(8, d, generator=generator).to(DEVICE), 20)
    assert (index.reranked >= 20).all() and index.reranked.float().mean() < 400
    assert index.bytes < 0.6 * keys.numel() * 2


def test_near_identical_keys_are_all_scored():
    keys = make_keys("near-identical", 2000, 128, torch.float32, torch.Generator().manual_seed(2)).to(DEVICE)
    index = CudaInt8Index(keys)
    scores, indices = search(index, keys[:1], 5)
    assert index.reranked.item() > 1000
    assert torch.equal(indices, search(all_scored(keys), keys[:1], 5)[1])


def test_among_equal_scores_the_lowest_index_wins():
    keys = torch.randn(5, 96)[torch.arange(500) % 5] * 2.0 ** (torch.arange(500)[:, None] % 3)
    scores, indices = search(CudaInt8Index(keys.to(DEVICE)), keys[2:3].to(DEVICE), 6)
    assert indices.tolist() == [[2, 7, 12, 17, 22, 27]] and scores.unique().numel() == 1


def test_strided_keys_given_norms_and_what_is_refused():
    table = torch.randn(600, 90).to(DEVICE)
    keys = table[::2, 10:74]
    ones = torch.ones(300, device=DEVICE)
    scores, indices = search(CudaInt8Index(keys, ones), keys[:2], 4)
    expected = reference.cosine_topk(keys[:2], keys, 4, key_norm=ones)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(scores, expected[0])
    index = CudaInt8Index(keys)
    ranges = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
    for q, span in ((keys[:2, :5], None), (keys[:2].double(), None), (keys[:17], None), (keys[:2], ranges)):
        with pytest.raises(ValueError, match="must be"):
            index.search(q, 3, span)
    with pytest.raises(ValueError, match="k must be 0 to 128, but is 129"):
        index.search(keys[:1], 129)
    for wrong in (keys.double(), keys[0], keys.to("meta")):
        with pytest.raises(ValueError, match="keys must be"):
            CudaInt8Index(wrong)
    with pytest.raises(ValueError, match=r"key_norm must be \[300\]"):
        CudaInt8Index(keys, torch.ones(3, device=DEVICE))
