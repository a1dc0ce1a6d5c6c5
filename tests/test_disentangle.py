"""Encoders, zeta and W_zeta on states whose structure is known, and on the trained emoji model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unike_kernels import reference
from unike_kernels.config import EncoderConfig
from unike_kernels.editing.disentangle import (
    Fits,
    fit_layer,
    linear_decoder,
    semantic_recall,
    split_groups,
    truthfulness_auc,
    untrained,
)

D = 16
QUICK = EncoderConfig(steps=100, lr=3e-3, held_out=0.2)


def world(n=240, concepts=60):
    """States of n triplets: a concept and the truth, both faint, under loud noise that says nothing of either.

    Returns what `fit_layer` takes (anchors, items_pos, items_neg, h_pos, h_neg, groups), and the truth's direction.
    """
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=g)).Q
    loud, faint, truth = basis[:5], basis[5:15], basis[15]
    codes = torch.randn(concepts, 10, generator=g)
    concept = torch.arange(n) % concepts

    def states(sign):
        noise = 2 * torch.randn(n, 5, generator=g) @ loud
        return noise + (codes[concept] + 0.1 * torch.randn(n, 10, generator=g)) @ faint + sign * 0.75 * truth

    anchors = codes[concept] @ torch.linalg.qr(torch.randn(D, D, generator=g)).Q[:10]
    h_pos, h_neg = states(1), states(-1)
    return [anchors, h_pos, h_neg, h_pos, h_neg, [f"concept {c}" for c in concept.tolist()]], truth


def test_fit_finds_truth_and_meaning_on_held_out_triplets():
    data, truth = world()
    fit = fit_layer(*data, QUICK)
    assert fit.held_out == 48  # 12 of 60 concepts
    assert fit.truthfulness_auc > 0.95 and fit.untrained_auc < 0.8
    # four triplets share a concept, so even a perfect encoder finds an anchor's own one time in four
    assert fit.semantic_recall > 0.2 and fit.untrained_recall < 0.1
    # mapped back to the states, the truthful direction is the one between the answers, not the noise
    assert torch.cosine_similarity(fit.zeta_prime, truth, dim=0) > 0.8
    torch.testing.assert_close(fit.zeta_prime, fit.w_zeta @ fit.zeta)
    h_pos, h_neg = (reference.encode(h, fit.enc_tru).mean(0) for h in data[3:5])
    assert torch.cosine_similarity(fit.zeta, h_pos - h_neg, dim=0) > 0.9
    assert fit.enc_sem[0][0].shape == (D, D) and len(fit.enc_sem) == len(fit.enc_tru) == 2


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_same_seed_same_fit(activation):
    config = EncoderConfig(steps=5, activation=activation)
    a, b = (fit_layer(*world(40)[0], config) for _ in range(2))
    other = fit_layer(*world(40)[0], EncoderConfig(steps=5, activation=activation, seed=1))
    assert torch.equal(a.zeta_prime, b.zeta_prime) and a.semantic_recall == b.semantic_recall
    assert not torch.equal(a.zeta_prime, other.zeta_prime)


def test_fit_does_not_see_what_is_held_out():
    """Other states of the held-out triplets change what is measured on them, and nothing else."""
    config = EncoderConfig(steps=10, held_out=0.3)
    data, _ = world(60)
    groups = data[-1]
    _, test = split_groups(groups, 0.3, torch.Generator().manual_seed(0))
    spoilt = [h.clone() for h in data[:-1]]
    for h in spoilt:
        h[test] = torch.randn(len(test), D)
    a, b = fit_layer(*data, config), fit_layer(*spoilt, groups, config)
    for x, y in zip([*a.enc_sem, *a.enc_tru], [*b.enc_sem, *b.enc_tru], strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    assert torch.equal(a.zeta_prime, b.zeta_prime) and a.truthfulness_auc != b.truthfulness_auc


def test_works_where_gradients_are_off_and_states_are_half():
    with torch.no_grad():
        half = [h.bfloat16() if isinstance(h, torch.Tensor) else h for h in world(40)[0]]
        fit = fit_layer(*half, EncoderConfig(steps=3))
    assert fit.zeta.dtype == torch.float32 and fit.zeta.isfinite().all() and not fit.zeta.requires_grad


def test_one_answer_leaves_nothing_to_hold_out():
    data = [*world(8)[0][:-1], ["the same"] * 8]
    fit = fit_layer(*data, EncoderConfig(steps=3))
    assert fit.held_out == 0 and math.isnan(fit.truthfulness_auc) and math.isnan(fit.semantic_recall)
    assert fit.zeta_prime.isfinite().all()


def test_fits_print_as_a_table():
    fits = Fits(
        {3: fit_layer(*world(40)[0], EncoderConfig(steps=3)), 2: fit_layer(*world(8)[0], EncoderConfig(steps=3))}
    )
    head, *rows = str(fits).splitlines()
    assert head.split("  ")[0] == "layer" and "truthfulness AUC" in head and "semantic recall@1" in head
    assert [row.split()[0] for row in rows] == ["2", "3"]
    assert rows[1].split()[1] == f"{fits[3].truthfulness_auc:.3f}" and rows[1].split()[-1] == "4"
    assert "tensor" not in repr(fits) and "AUC" in repr(fits[3])


# Its parts, by hand


def test_linear_decoder_by_hand():
    # one dimension: centred z = (-1, 1), h = (-2, 2), so z'h = 4 and z'z = 2, the mean squared singular value too
    z, h = torch.tensor([[4.0], [6.0]]), torch.tensor([[1.0], [5.0]])
    for ridge in (0.0, 0.5, 1.0):
        assert float(linear_decoder(z, h, ridge)) == pytest.approx(4 / (2 + ridge * 2))
        assert float(linear_decoder(z * 10, h, ridge)) == pytest.approx(0.4 / (2 + ridge * 2))  # whatever the scale


def test_linear_decoder_inverts_a_linear_encoder():
    g = torch.Generator().manual_seed(0)
    states, weight = torch.randn(50, 6, generator=g), torch.randn(6, 6, generator=g)
    encoded = states @ weight.T + 3.0
    torch.testing.assert_close(linear_decoder(encoded, states, 0.0), torch.linalg.inv(weight), rtol=1e-3, atol=1e-3)


def test_linear_decoder_of_few_states_stays_finite():
    assert linear_decoder(torch.randn(2, 6), torch.randn(2, 6), 1e-2).isfinite().all()
    assert (linear_decoder(torch.ones(3, 6), torch.ones(3, 6), 1e-2) == 0).all()  # states that never change


def test_auc_by_hand():
    zeta = torch.tensor([1.0, 0.0])
    at = {1.0: [2.0, 0.0], 0.0: [0.0, 1.0], -1.0: [-3.0, 0.0]}  # states by their cosine with zeta

    def auc(pos, neg):
        return truthfulness_auc(*(torch.tensor([at[c] for c in cosines]) for cosines in (pos, neg)), zeta)

    assert auc([1.0, 1.0], [0.0, -1.0]) == 1.0
    assert auc([-1.0], [0.0, 1.0]) == 0.0
    assert auc([1.0, 0.0], [0.0, -1.0]) == pytest.approx(3.5 / 4)  # one tie counts half
    assert math.isnan(truthfulness_auc(torch.zeros(0, 2), torch.ones(1, 2), zeta))


def test_recall_by_hand():
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    encoded = torch.tensor([[9.0, 0.1], [0.1, 3.0], [-1.0, 0.1], [1.0, 1.0]])  # the last two are swapped
    assert semantic_recall(anchors, encoded) == 0.5
    assert semantic_recall(anchors, anchors * 7) == 1.0
    assert math.isnan(semantic_recall(anchors[:0], encoded[:0]))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.floats(0.0, 0.9), st.integers(0, 5))
def test_split_keeps_groups_whole(groups, held_out, seed):
    train, test = split_groups(groups, held_out, torch.Generator().manual_seed(seed))
    assert sorted(train.tolist() + test.tolist()) == list(range(len(groups)))
    inside, outside = ({groups[i] for i in part.tolist()} for part in (train, test))
    assert not inside & outside and inside
    names = len(set(groups))
    none = names == 1 or held_out == 0
    assert len(outside) == (0 if none else min(max(1, round(held_out * names)), names - 1))


def test_nothing_is_held_out_where_that_is_asked_for():
    fit = fit_layer(*world(40)[0], EncoderConfig(steps=3, held_out=0.0))
    assert fit.held_out == 0 and math.isnan(fit.truthfulness_auc) and math.isnan(fit.semantic_recall)


def test_untrained_encoders_keep_the_scale():
    encoder = untrained(400, torch.Generator().manual_seed(0))
    x = torch.randn(50, 400, generator=torch.Generator().manual_seed(1))
    assert reference.encode(x, encoder).std() == pytest.approx(1.0, abs=0.1)
