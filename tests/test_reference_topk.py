"""Top-K retrieval of the reference against plain loops: order, ties, ranges, and what is never retrieved."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from unike_kernels import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def plain_topk(q, keys, k, ranges=None):
    """One query and one key at a time; sorted() is stable, so the lowest index wins."""
    scores, indices = [], []
    for t, query in enumerate(q):
        start, end = (0, len(keys)) if ranges is None else ranges[t].tolist()
        found = []
        for i in range(max(start, 0), min(end, len(keys))):
            norms = query.norm() * keys[i].norm()
            cosine = float(query @ keys[i] / norms) if norms > 0 else float((query @ keys[i]) * 0)
            if math.isfinite(cosine):
                found.append((cosine + 0.0, i))
        found = sorted(found, key=lambda pair: -pair[0])[:k]
        missing = k - len(found)
        scores.append([s for s, _ in found] + [-math.inf] * missing)
        indices.append([i for _, i in found] + [-1] * missing)
    return torch.tensor(scores, dtype=torch.float64).view(len(q), k), torch.tensor(indices).view(len(q), k)


# Coordinates of small integers: equal and opposite rows, zero rows and so equal cosines are frequent, and rows of one
# direction and length have bitwise equal scores.
VECTORS = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), min_size=2, max_size=2)


@given(
    q=st.lists(VECTORS, max_size=3),
    keys=st.lists(VECTORS, max_size=9),
    k=st.integers(0, 11),
    nans=st.sets(st.integers(0, 8), max_size=2),
    bounds=st.none() | st.lists(st.integers(-1, 10), min_size=6, max_size=6),
)
def test_topk_invariants(q, keys, k, nans, bounds):
    q, keys = torch.tensor(q).view(-1, 2), torch.tensor(keys).view(-1, 2)
    nans = [i for i in nans if i < len(keys)]
    keys[nans] = math.nan
    ranges = None if bounds is None else torch.tensor(bounds).view(3, 2)[: len(q)]
    scores, indices = reference.cosine_topk(q, keys, k, ranges=ranges)
    assert scores.shape == indices.shape == (len(q), k) and scores.dtype == torch.float32
    every, order = reference.cosine_topk(q, keys, len(keys))
    for t in range(len(q)):
        score = {int(i): float(s) for s, i in zip(every[t], order[t], strict=True) if i >= 0}
        assert set(score) == set(range(len(keys))) - set(nans)
        start, end = (0, len(keys)) if ranges is None else ranges[t].tolist()
        candidates = [i for i in sorted(score) if start <= i < end]
        chosen = [int(i) for i in indices[t] if i >= 0]
        assert len(set(chosen)) == len(chosen) == min(k, len(candidates))
        assert [float(s) for s in scores[t]] == [score[i] for i in chosen] + [-math.inf] * (k - len(chosen))
        # Sorted, ties to the lowest index, nothing better left out: all three in one.
        assert chosen == sorted(candidates, key=lambda i: -score[i])[: len(chosen)]


def test_topk_matches_plain_loops():
    q, keys, ranges = randn(5, 8), randn(40, 8), torch.tensor([[0, 40], [3, 9], [5, 5], [30, 99], [-4, 2]])
    q[3], keys[7], keys[11] = 0, 0, math.nan
    for options in ({}, {"ranges": ranges}):
        scores, indices = reference.cosine_topk(q, keys, 6, **options)
        expected = plain_topk(q, keys, 6, **options)
        torch.testing.assert_close(scores, expected[0])
        assert torch.equal(indices, expected[1])


def test_topk_of_one_exact_tie_after_another():
    """Equal rows score equally; a block of ties may begin before the K-th place and end after it."""
    keys = torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [1, 0], [-1, 0]])
    scores, indices = reference.cosine_topk(torch.tensor([[2.0, 0]]), keys, 3)
    assert indices.tolist() == [[1, 2, 4]] and scores.tolist() == [[1, 1, 1]]
    scores, indices = reference.cosine_topk(torch.tensor([[2.0, 0]]), keys, 5)
    assert indices.tolist() == [[1, 2, 4, 5, 0]] and scores.tolist() == [[1, 1, 1, 1, 0]]


def test_topk_zero_vectors_score_0_and_the_two_zeros_are_one_score():
    keys = torch.tensor([[-0.0, 0.0], [-1.0, 0.0], [-1e-35, 1e15], [0.0, 0.0]])  # the third: -1e-50, which is -0.0
    scores, indices = reference.cosine_topk(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), keys, 4)
    assert indices.tolist() == [[0, 2, 3, 1], [0, 1, 2, 3]]
    assert scores.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]] and not scores[scores == 0].signbit().any()


def test_topk_nothing_that_is_not_finite_is_retrieved():
    keys = randn(7, 3)
    keys[1, 0], keys[4, 2], keys[6, 2] = math.nan, math.inf, -math.inf
    q = torch.stack([randn(3), torch.tensor([math.nan, 1, 1]), torch.tensor([1, -math.inf, 1])])
    scores, indices = reference.cosine_topk(q, keys, 7)
    assert sorted(indices[0].tolist()) == [-1, -1, -1, 0, 2, 3, 5] and scores[0, 4:].tolist() == [-math.inf] * 3
    assert indices[1:].eq(-1).all() and scores[1:].eq(-math.inf).all()
    stored = reference.cosine_topk(q, keys, 7, key_norm=torch.ones(7).double())  # norms that know nothing of it
    assert torch.equal(stored[1].sort()[0], indices.sort()[0])


def test_topk_stored_norms_and_unit_rows():
    q, keys = randn(2, 4, 8), randn(30, 8)
    scores, indices = reference.cosine_topk(q, keys, 5)
    assert scores.shape == (2, 4, 5)
    norm = keys.norm(dim=1)
    for given_keys, key_norm in ((keys, norm), (keys / norm[:, None], torch.ones(30).double())):
        again = reference.cosine_topk(q, given_keys, 5, key_norm=key_norm)
        torch.testing.assert_close(again[0], scores)
        assert torch.equal(again[1], indices)
    # The norm divides, whatever the row says: half the norm, twice the score.
    torch.testing.assert_close(reference.cosine_topk(q, keys, 5, key_norm=norm / 2)[0], 2 * scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_scores_are_at_least_float32(dtype):
    q, keys = randn(3, 16).to(dtype), randn(20, 16).to(dtype)
    scores, indices = reference.cosine_topk(q, keys, 4)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = plain_topk(q.double(), keys.double(), 4)
    torch.testing.assert_close(scores.double(), expected[0], atol=1e-6, rtol=0)
    assert torch.equal(indices, expected[1])
