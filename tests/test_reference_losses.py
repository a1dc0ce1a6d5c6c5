"""Equations 4 and 5 and zeta against numbers worked out by hand."""

import math

import pytest
import torch

from unike_kernels import reference


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


# Two triplets whose cosines are 0, 1 or -1, so that every similarity is 0, s or -s with s = 1 / temperature.
POS = [[2.0, 0, 0], [0, 3.0, 0]]
NEG = [[-1.0, 0, 0], [0, 0, 5.0]]


def test_truthfulness_loss_by_hand():
    s = 2.0  # temperature 0.5
    e, one, inverse = math.exp(s), 1.0, math.exp(-s)
    pos, neg = torch.tensor(POS).double(), torch.tensor([[-1.0, 0, 0], [-4.0, 0, 0]]).double()
    # p_1 = x: P gives x.x = 1 and x.y = 0; Q gives -1 twice.
    p_1 = math.log((e + one) / (e + one + 2 * inverse))
    # p_2 = y: P gives 0 and 1; Q gives 0 twice.
    p_2 = math.log((one + e) / (one + e + 2 * one))
    # n_1 = n_2 = -x: Q gives 1 twice; P gives -1 and 0.
    n_1 = n_2 = math.log(2 * e / (2 * e + inverse + one))
    expected = -(p_1 + n_1 + p_2 + n_2) / 2
    assert expected == pytest.approx(0.19681, abs=1e-5)
    assert reference.truthfulness_loss(pos, neg, 0.5).item() == pytest.approx(expected, rel=1e-12)
    alone = -2 * math.log(e / (e + inverse))  # one triplet: 1 to itself, -1 to the other side
    assert reference.truthfulness_loss(pos[:1], neg[:1], 0.5).item() == pytest.approx(alone, rel=1e-12)


def test_semantic_loss_by_hand():
    s = 2.0
    e, one, inverse = math.exp(s), 1.0, math.exp(-s)
    anchors = torch.tensor([[4.0, 0, 0], [0, 0, 0.5]]).double()
    # a_1 = x: p_1 = x gives 1, n_1 = -x gives -1, p_2 = y and n_2 = z give 0.
    a_1 = math.log((e + inverse) / (e + inverse + one + one))
    # a_2 = z: p_2 = y gives 0, n_2 = z gives 1, p_1 and n_1 give 0.
    a_2 = math.log((one + e) / (one + e + one + one))
    expected = -(a_1 + a_2) / 2
    assert expected == pytest.approx(0.22477, abs=1e-5)
    pos, neg = torch.tensor(POS).double(), torch.tensor(NEG).double()
    assert reference.semantic_loss(anchors, pos, neg, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_zeta_is_the_difference_of_the_means():
    assert reference.zeta(torch.tensor(POS), torch.tensor(NEG)).tolist() == [1.5, 1.5, -2.5]


def test_losses_do_not_overflow_at_a_low_temperature():
    pos, neg = randn(8, 4, dtype=torch.float32), randn(8, 4, dtype=torch.float32)
    assert reference.truthfulness_loss(pos, neg, 1e-3).isfinite()
    assert reference.semantic_loss(pos + neg, pos, neg, 1e-3).isfinite()


def test_gradcheck_losses():
    a, p, n = (randn(3, 4).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(reference.truthfulness_loss, (p, n))
    assert torch.autograd.gradcheck(reference.semantic_loss, (a, p, n))
