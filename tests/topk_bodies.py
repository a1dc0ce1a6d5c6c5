"""What every implementation of `cosine_topk` has to pass, as a class of tests that each backend's file inherits."""

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def integers(*shape, low=-2, high=3, dtype=torch.float32):
    return torch.randint(low, high, shape).to(DEVICE, dtype)


class CosineTopk:
    """The tests; a subclass names its backend and how its kernels start."""

    backend: str

    def kernels(self, queries, n):
        """The kernels that start: what reads the keys, if there are any, and what picks the best."""
        return (*(["cosine_topk_scan"] if n else []), "cosine_topk_merge")

    def found(self, q, keys, k, **options):
        """The kernel's result, from poisoned memory; its kernels ran."""
        with poisoned(), launches() as counted:
            scores, indices = ops.cosine_topk(q, keys, k, **options, backend=self.backend)
        if q.numel() and k:
            assert counted == dict.fromkeys(self.kernels(q.shape[:-1].numel(), len(keys)), 1)
        assert scores.dtype == torch.float32 and indices.dtype == torch.int64
        return scores, indices

    def check(self, q, keys, k, **options):
        """Scores within the tolerance; the items are the best ones, but for those within rounding of the last one."""
        scores, indices = self.found(q, keys, k, **options)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in options.items()}
        truth, wanted = reference.cosine_topk(q.double(), keys.double(), k, **wide)
        same, _ = reference.cosine_topk(q, keys, k, **options)
        some = truth.isfinite()
        assert torch.equal(some, scores.isfinite()) and torch.equal(indices < 0, ~some)
        assert_close_to_reference(scores[some], truth[some], same[some], 2)
        for row, (mine, theirs) in enumerate(zip(indices.flatten(0, -2), wanted.flatten(0, -2), strict=True)):
            assert len(set(mine[mine >= 0].tolist())) == (mine >= 0).sum(), "an item was found twice"
            extra = sorted(set(mine.tolist()) - set(theirs.tolist()))
            if extra:  # each is as good as the last one, but for rounding: 4 eps of a cosine
                norm = keys.double().norm(dim=1) if "key_norm" not in options else options["key_norm"].double()
                unit = torch.nn.functional.normalize(q.double().reshape(-1, q.shape[-1])[row], dim=0)
                last = truth.flatten(0, -2)[row][some.flatten(0, -2)[row]].min()
                assert ((keys.double()[extra] @ unit / norm[extra]) - last).abs().max() <= 4 * 2**-23
        return scores, indices

    def exact(self, q, keys, k, **options):
        """Integers of small size and norms that are powers of two: no rounding at all, so everything is equal."""
        scores, indices = self.found(q, keys, k, **options)
        expected, wanted = reference.cosine_topk(q, keys, k, **options)
        assert torch.equal(indices, wanted)
        assert torch.equal(scores, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "n", "d", "k"), [(1, 200, 64, 5), (3, 65, 33, 16), (17, 64, 48, 3)])
    def test_the_items_are_those_of_the_reference(self, dtype, tokens, n, d, k):
        q, keys = rand(tokens, d, dtype=dtype), rand(n, d, dtype=dtype)
        self.check(q, keys, k)
        self.check(q, keys, k, key_norm=keys.float().norm(dim=1))

    def test_mixed_dtypes_lose_nothing(self):
        q, keys = rand(2, 40), rand(70, 40, dtype=torch.bfloat16)
        self.check(q, keys, 4)
        self.check(keys[:2], q, 1)

    @pytest.mark.parametrize("k", [1, 17, 40, 128])
    def test_every_size_of_k(self, k):
        self.check(rand(1, 16), rand(130, 16), k)

    @pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (5, 0), (63, 2), (64, 2), (65, 2)])
    def test_few_items_and_the_edges_of_blocks(self, n, k):
        q, keys = rand(2, 3, 20), rand(n, 20)
        scores, indices = self.check(q, keys, k)
        assert scores.shape == indices.shape == (2, 3, k)

    @pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 64, 65])
    def test_any_number_of_queries(self, tokens):
        self.check(rand(tokens, 16), rand(40, 16), 2)

    def test_equal_scores_go_to_the_lowest_index(self):
        row = torch.tensor([2.0, 0.0, 0.0, 0.0], device=DEVICE)
        keys = torch.stack([-row, *[row] * 70, torch.zeros_like(row), -0.0 * row, *[row] * 4])
        self.exact(torch.stack([row, -row, torch.zeros_like(row)]), keys, 16)

    @settings(max_examples=4, suppress_health_check=[hypothesis.HealthCheck.differing_executors])
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 90), k=st.integers(1, 16))
    def test_ties_of_integer_rows(self, seed, n, k):
        torch.manual_seed(seed)
        keys = integers(n, 8)
        self.exact(4 * torch.eye(8, device=DEVICE)[:3], keys, k, key_norm=torch.ones(n, device=DEVICE))

    def test_what_is_not_finite(self):
        q, keys = rand(4, 24), rand(70, 24)
        q[0, 3], q[1, 0], q[2] = float("nan"), float("inf"), 0.0
        keys[5, 2], keys[6, 1], keys[7] = float("nan"), float("-inf"), 0.0
        scores, indices = self.check(q, keys, 16)
        assert (indices[:2] == -1).all()
        assert not torch.isin(indices, torch.tensor([5, 6], device=DEVICE)).any()
        assert torch.equal(indices[2], torch.tensor([0, 1, 2, 3, 4, *range(7, 18)], device=DEVICE))  # all zero: all tie

    def test_ranges(self):
        q, keys = rand(7, 16), rand(150, 16)
        spans = [[0, 150], [0, 0], [149, 150], [60, 70], [100, 30], [-5, 3], [140, 900]]
        ranges = torch.tensor(spans, device=DEVICE)
        scores, indices = self.check(q, keys, 5, ranges=ranges)
        assert (indices[1] == -1).all() and (indices[4] == -1).all()
        assert (scores[2].isfinite()).sum() == 1
        for row, (start, end) in enumerate(spans):
            inside = indices[row][indices[row] >= 0]
            assert ((inside >= start) & (inside < end)).all()
        alone = self.found(q[3:4], keys[60:70], 5)  # rows in other places of other tiles
        torch.testing.assert_close(alone[0], scores[3:4])
        assert torch.equal(alone[1] + 60, indices[3:4])

    @pytest.mark.parametrize("far", [2**31 * 64, 2**37 + 5, 2**63 - 1])
    def test_ranges_that_end_far_from_the_keys(self, far):
        """At either side, as far as int64 goes; alone, so that no other query brings its rows into view."""
        q, keys = rand(1, 16), rand(150, 16)
        for span in ([-far, far], [-far - 1, 140], [10, far], [far - 3, far], [-far - 1, -far]):
            self.exact_ranges(q, keys, torch.tensor([span], device=DEVICE))

    def exact_ranges(self, q, keys, ranges):
        inside = ranges.clamp(0, len(keys))
        found, expected = (self.check(q, keys, 5, ranges=of) for of in (ranges, inside))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_views(self):
        q, keys = rand(3, 33), rand(80, 33)
        expected = self.found(q, keys, 4)
        for of_q, of_keys in ((shifted, strided), (strided, shifted)):
            again = self.found(of_q(q), of_keys(keys), 4)
            assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
        across = self.found(q.T.contiguous().T, keys.T.contiguous().T, 4)
        assert torch.equal(across[1], expected[1])

    def test_permuting_the_memory_permutes_the_indices(self):
        q, keys = rand(2, 16), rand(100, 16)
        scores, indices = self.found(q, keys, 5)
        order = torch.randperm(100).to(DEVICE)
        again, moved = self.found(q, keys[order], 5)
        torch.testing.assert_close(again, scores, rtol=0, atol=2**-22)
        assert torch.equal(order[moved], indices)

    def test_a_worse_item_changes_nothing(self):
        q, keys = rand(1, 16), rand(63, 16)
        scores, indices = self.found(q, keys, 3)
        worse = torch.cat([keys, -q])
        assert all(torch.equal(a, b) for a, b in zip((scores, indices), self.found(q, worse, 3), strict=True))

    def test_three_runs_are_equal(self):
        q, keys = rand(2, 40, dtype=torch.bfloat16), rand(150, 40, dtype=torch.bfloat16)
        first, *others = [self.found(q, keys, 6) for _ in range(3)]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
