"""Every metric against cases worked out by hand, and the properties that all of them share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unike_kernels.evaluation import metrics


def one_hot(ids, vocabulary=6):
    return torch.nn.functional.one_hot(torch.tensor(ids), vocabulary).float()


def test_target_ids_are_shifted_by_one_and_leave_padding_out():
    # what the model says after each position; the target stands at positions 2, 3 of row 0 and 1 of row 1
    logits = one_hot([[5, 1, 2, 3], [4, 0, 0, 0]])
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    assert [ids.tolist() for ids in metrics.target_ids(logits, mask)] == [[1, 2], [4]]


def test_a_target_at_position_0_is_refused():
    with pytest.raises(ValueError, match="position 0"):
        metrics.target_ids(torch.zeros(1, 2, 3), torch.tensor([[True, False]]))


@pytest.mark.parametrize(("ids", "share"), [([1, 2, 3], 1.0), ([1, 2, 0], 2 / 3), ([3, 1, 2], 0.0)])
def test_token_accuracy_and_locality_a_are_shares_of_positions(ids, share):
    for metric in (metrics.token_accuracy, metrics.locality_a):
        assert metric(torch.tensor(ids), torch.tensor([1, 2, 3])) == pytest.approx(share)


@pytest.mark.parametrize("metric", [metrics.token_accuracy, metrics.locality_a])
@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 2])])
def test_ids_that_do_not_match_are_refused(metric, a, b):
    with pytest.raises(ValueError, match="of one length, at least 1"):
        metric(torch.tensor(a), torch.tensor(b))


def test_locality_b_compares_rank_by_rank():
    before = torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert metrics.locality_b(before, before) == 1.0
    assert metrics.locality_b(before, torch.tensor([[1, 3, 2], [4, 5, 0]])) == pytest.approx(4 / 6)
    assert metrics.locality_b(before, torch.tensor([[2, 3, 1], [0, 4, 5]])) == 0.0  # the same ids, no rank
    with pytest.raises(ValueError, match="before is"):
        metrics.locality_b(before, before[:, :2])


def test_top_ids_are_ordered():
    assert metrics.top_ids(torch.tensor([0.1, 3.0, -1.0, 2.0]), 3).tolist() == [1, 3, 0]


def test_top_ids_of_a_small_vocabulary():
    assert metrics.top_ids(torch.tensor([[0.0, 1.0]]), 10).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("said", "target", "same"),
    [(" red dog ", "red dog\n", True), ("red dog.", "red dog", False), ("Red dog", "red dog", False), ("", "a", False)],
)
def test_exact_match_is_exact_but_for_white_space_around(said, target, same):
    assert metrics.exact_match(said, target) is same


def test_mean_of_five():
    assert metrics.mean_of_five(100, 90, 80, 70, 60) == 80.0


def test_clustered_error_by_hand():
    # mean 3; cluster sums of deviations: a -3, b +3; variance (9 + 9) * 2 / 1 = 36; error 6 / 4 values
    assert metrics.clustered_error([1, 2, 4, 5], ["a", "a", "b", "b"]) == pytest.approx(1.5)
    # every value a cluster of its own: the usual standard error of the mean, sd / sqrt(n)
    values = [1.0, 2.0, 4.0, 5.0]
    sd = math.sqrt(sum((v - 3) ** 2 for v in values) / 3)
    assert metrics.clustered_error(values, list("abcd")) == pytest.approx(sd / 2)
    # clusters whose values cancel know the mean exactly
    assert metrics.clustered_error([1, 5, 2, 4], ["a", "a", "b", "b"]) == 0.0


def test_clustered_error_of_too_little():
    assert math.isnan(metrics.clustered_error([1, 2], ["a", "a"]))
    assert math.isnan(metrics.clustered_error([], []))
    with pytest.raises(ValueError, match="2 values, but 1 clusters"):
        metrics.clustered_error([1, 2], ["a"])


@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abc")), min_size=2, max_size=20), st.floats(-3, 3))
def test_clustered_error_ignores_order_and_offset(pairs, offset):
    values, clusters = zip(*pairs, strict=True)
    error = metrics.clustered_error(values, clusters)
    moved = metrics.clustered_error([v + offset for v in values[::-1]], clusters[::-1])
    assert (math.isnan(error) and math.isnan(moved)) or error == pytest.approx(moved, abs=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.data())
def test_locality_is_symmetric_and_bounded(ids, data):
    other = data.draw(st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)))
    a, b = torch.tensor(ids), torch.tensor(other)
    assert metrics.locality_a(a, b) == metrics.locality_a(b, a)
    assert 0.0 <= metrics.locality_a(a, b) <= 1.0 == metrics.locality_a(a, a)
    assert metrics.locality_b(a[:, None], b[:, None]) == metrics.locality_a(a, b)  # at top 1 of the same positions


def test_bootstrap_interval_by_hand():
    # two clusters: a draw is (a, a), (a, b) or (b, b), with mean 1, 2 or 3 and chances 1/4, 1/2, 1/4
    assert metrics.bootstrap_interval([1.0, 1.0, 3.0, 3.0], ["a", "a", "b", "b"]) == (1.0, 3.0)
    assert metrics.bootstrap_interval([1.0, 3.0], ["a", "b"], level=0.4) == (2.0, 2.0)
    # clusters of different sizes weigh by their size: (a, b) has mean (1 + 1 + 1 + 5) / 4
    low, high = metrics.bootstrap_interval([1.0, 1.0, 1.0, 5.0], list("aaab"), level=0.4)
    assert (low, high) == (2.0, 2.0)
    assert metrics.bootstrap_interval([2.0] * 9, list("abcdefghi")) == (2.0, 2.0)
    assert all(math.isnan(x) for x in metrics.bootstrap_interval([1.0, 2.0], ["a", "a"]))
    with pytest.raises(ValueError, match="2 values, but 1 clusters"):
        metrics.bootstrap_interval([1.0, 2.0], ["a"])


def test_bootstrap_interval_of_many_is_the_normal_one():
    values = [float(i % 10) for i in range(400)]
    low, high = metrics.bootstrap_interval(values, [str(i) for i in range(400)])
    half = 1.96 * metrics.clustered_error(values, [str(i) for i in range(400)])
    assert (low, high) == pytest.approx((4.5 - half, 4.5 + half), abs=0.05)
    assert metrics.bootstrap_interval(values, [str(i) for i in range(400)]) == (low, high)  # a seed's
