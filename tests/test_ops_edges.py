"""The operators where nothing acts: no tokens, no items, nothing selected, alpha 0; all pass bit for bit."""

import math

import pytest
import torch

from tests.test_ops import DTYPES
from unike_kernels import ops, reference


def neurons(n=6, d=8, dtype=torch.float32):
    return torch.randn(n, d, dtype=dtype), torch.randn(n, dtype=dtype), torch.randn(n, d, dtype=dtype)


NONE_SELECTED = {
    "selected": {"selected": torch.full((2, 3), -1)},
    "selected none": {"selected": torch.empty(2, 0, dtype=torch.long)},
    "route": {"route": torch.zeros(2, 2)},
    "no case": {"route": torch.ones(2, 2), "token_to_case": torch.full((4,), -1)},
    "route and selected": {"route": torch.tensor([[1.0, 0], [1, 0]]), "selected": torch.tensor([[1], [1]])},
}


@pytest.mark.parametrize("how", NONE_SELECTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_selected_adds_nothing(how, dtype):
    x, y = torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    y[0, 0] = -0.0
    routing = {"group_ptr": torch.tensor([0, 3, 6]), "token_to_case": torch.tensor([0, 1, 0, 1]), **NONE_SELECTED[how]}
    parts = neurons(dtype=dtype)
    for part in parts:
        part.fill_(math.nan)
    added = ops.extra_neurons(x, *parts, act="relu", **routing)
    assert torch.equal(added, torch.zeros_like(x)) and torch.equal(y + added, y)
    kept = y.clone()
    assert ops.extra_neurons_(y, x, *parts, act="relu", **routing) is y
    assert torch.equal(y, kept) and y[0, 0].signbit()


EMPTY_PTR = torch.tensor([0, 0, 0])
NO_GROUPS = {
    "no neurons": {},
    "no groups": {"group_ptr": torch.tensor([0])},
    "empty groups": {"group_ptr": EMPTY_PTR},
    "an empty group selected": {"group_ptr": EMPTY_PTR, "selected": torch.ones(4, 1, dtype=torch.long)},
}


@pytest.mark.parametrize("routing", NO_GROUPS.values(), ids=NO_GROUPS)
def test_no_groups_add_nothing(routing):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    y[0, 0] = -0.0
    parts = neurons(n=3 if routing else 0)
    assert torch.equal(ops.extra_neurons(x, *parts, act="relu", **routing), torch.zeros_like(x))
    kept = y.clone()
    ops.extra_neurons_(y, x, *parts, act="relu", **routing)
    assert torch.equal(y, kept) and y[0, 0].signbit()
    base = torch.randn(9, 8), torch.randn(9), torch.randn(8, 9), torch.randn(8)
    assert torch.equal(ops.augmented_ffn(x, *base, *neurons(n=0), act="relu"), reference.ffn(x, *base, act="relu"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_unselected_group_does_not_leak(bad):
    parts = neurons()
    for part in parts:
        part[2:5] = bad
    x, ptr = torch.randn(4, 8), torch.tensor([0, 2, 5, 6])
    leaves = [t.requires_grad_() for t in (x, *parts)]
    route = torch.tensor([[0.5, 0, 1.0]] * 4, requires_grad=True)
    y = ops.extra_neurons(*leaves, act="gelu", group_ptr=ptr, route=route)
    assert y.isfinite().all()
    gradients = torch.autograd.grad(y.sum(), [*leaves, route])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient[2:5].eq(0).all() for gradient in gradients[1:4]) and gradients[4][:, 1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_rounded_once_and_leaves_other_rows_alone(dtype):
    x, y, parts = torch.randn(5, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), neurons(dtype=dtype)
    y[1, 0], y[3, 3] = -0.0, math.nan
    routing = {
        "group_ptr": torch.tensor([0, 3, 6]),
        "selected": torch.tensor([[0], [1]]),
        "token_to_case": torch.tensor([0, -1, 1, -1, 0]),
    }
    before = y.clone()
    more = reference.extra_neurons(x.float(), *(part.float() for part in parts), act="relu", **routing)
    ops.extra_neurons_(y, x, *parts, act="relu", **routing, backend="reference")
    acts = routing["token_to_case"] >= 0
    assert torch.equal(y[acts], (before.float() + more).to(dtype)[acts]) and not torch.equal(y[acts], before[acts])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y[~acts].view(bits), before[~acts].view(bits))


def test_in_place_refuses_what_requires_grad():
    parts, x = neurons(), torch.randn(4, 8)
    weights = [part.clone().requires_grad_() for part in parts]
    y = torch.randn(4, 8)
    kept = y.clone()
    with pytest.raises(ValueError, match=r"in place and has no gradient, but keys requires grad"):
        ops.extra_neurons_(y, x, *weights, act="relu")
    with pytest.raises(ValueError, match=r"but y requires grad"):
        ops.extra_neurons_(torch.randn(4, 8, requires_grad=True), x, *parts, act="relu")
    assert torch.equal(y, kept)
    with torch.no_grad():
        ops.extra_neurons_(y, x, *weights, act="relu")
    assert not torch.equal(y, kept)


def shift_inputs(dtype=torch.float32):
    h, q = torch.randn(6, 8, dtype=dtype), torch.randn(6, 4, 2, dtype=dtype)
    h[0, 0] = -0.0
    return h, q, torch.randn(5, 2, 2, dtype=dtype), torch.randn(5, 2, 2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_0_gives_the_input(dtype):
    h, q, keys, values = shift_inputs(dtype)
    values.fill_(math.nan)
    indices = torch.arange(2).expand(6, 2)
    for alpha, orientation in ((0.0, "knowledge"), (1.0, "input"), (torch.zeros(6), "knowledge")):
        out, used = ops.knowledge_shift(h, q, keys, values, indices, alpha=alpha, orientation=orientation)
        assert torch.equal(out, h) and out[0, 0].signbit()
        assert used.eq(0.0 if orientation == "knowledge" else 1.0).all() and used.dtype == torch.float32


NOTHING_RETRIEVED = {
    "K = 0": (5, torch.empty(6, 0, dtype=torch.long)),
    "all -1": (5, torch.full((6, 3), -1)),
    "N = 0": (0, torch.full((6, 3), -1)),
    "N = 0, indices of what was there": (0, torch.zeros(6, 3, dtype=torch.long)),
}


@pytest.mark.parametrize("how", NOTHING_RETRIEVED)
@pytest.mark.parametrize(("orientation", "untouched"), [("knowledge", 0.0), ("input", 1.0)])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_nothing_retrieved_gives_the_input(how, orientation, untouched, alpha):
    items, indices = NOTHING_RETRIEVED[how]
    h, q, keys, values = shift_inputs()
    weight = torch.full((8, 8), math.nan)  # not looked at
    for leaf in (h, q, keys, values, weight):
        leaf.requires_grad_()
    encoder = [(torch.randn(8, 8), torch.randn(8))]
    options = {"alpha": alpha, "orientation": orientation, "encoder": encoder, "out_proj": (weight, None)}
    out, used = ops.knowledge_shift(h, q, keys[:items], values[:items], indices, **options)
    assert torch.equal(out, h) and out[0, 0].signbit() and used.shape == (6,) and used.eq(untouched).all()
    gradients = torch.autograd.grad(out.sum(), [h, q, keys, values, weight])
    assert gradients[0].eq(1).all() and all(gradient.eq(0).all() for gradient in gradients[1:])
    raw = ops.knowledge_shift(h, q.flatten(1), keys.view(5, 4).repeat(1, 2)[:items], torch.randn(items, 8), indices)
    assert torch.equal(raw[0], h)


def test_k_0_retrieves_nothing():
    scores, indices = ops.cosine_topk(torch.randn(2, 3, 8), torch.randn(5, 8), 0)
    assert scores.shape == indices.shape == (2, 3, 0)


@pytest.mark.parametrize(("orientation", "untouched"), [("knowledge", 0.0), ("input", 1.0)])
def test_tokens_of_no_case_and_cases_without_items_pass_bit_for_bit(orientation, untouched):
    h, q, keys, values = shift_inputs()
    keys[0] = values[0] = math.nan  # the row that stands in for index -1
    cases = torch.tensor([1, -1, 0, 2, 0, -1])
    indices = torch.tensor([[1, 2], [-1, -1], [4, -1]])
    for options in ({"alpha": 0.5}, {"case_tokens": torch.tensor([4, 0, -1])}, {}):
        options |= {"token_to_case": cases, "clamp": False, "orientation": orientation}
        out, used = ops.knowledge_shift(h, q, keys, values, indices, **options)
        acts = torch.tensor([False, False, True, "case_tokens" not in options, True, False])
        assert out.isfinite().all()
        assert [torch.equal(a, b) for a, b in zip(out, h, strict=True)] == (~acts).tolist()
        assert used.shape == ((3,) if "alpha" in options or "case_tokens" in options else (6,))
        per_token = used if len(used) == 6 else torch.where(cases >= 0, used[cases], untouched)
        assert torch.equal(per_token != untouched, acts)


def test_alpha_per_case_is_that_of_the_case_token():
    h, q, keys, values = shift_inputs()
    cases, indices, at = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[1, 2, 3], [4, 0, -1]]), torch.tensor([2, 3])
    encoder = [(torch.randn(8, 8), torch.randn(8))]
    options = {"encoder": encoder, "clamp": False, "out_proj": (torch.randn(8, 8), torch.randn(8))}
    per_token = ops.knowledge_shift(h, q, keys, values, indices[cases], **options)[1]
    out, used = ops.knowledge_shift(h, q, keys, values, indices, token_to_case=cases, case_tokens=at, **options)
    torch.testing.assert_close(used, per_token[at])
    given = ops.knowledge_shift(h, q, keys, values, indices, token_to_case=cases, alpha=used, **options)[0]
    torch.testing.assert_close(given, out)
    spread = ops.knowledge_shift(h, q, keys, values, indices, token_to_case=cases, alpha=used[cases], **options)
    torch.testing.assert_close(spread[0], out)
    assert spread[1].shape == (6,)


def test_topk_carries_no_gradient():
    scores, _ = ops.cosine_topk(torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True), 3)
    assert not scores.requires_grad


# ------------------------------------------------------------------------------------------------- empty inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype):
    parts = neurons(dtype=dtype)
    for x in (torch.empty(0, 8, dtype=dtype), torch.empty(2, 0, 8, dtype=dtype)):
        none = torch.empty(0, dtype=torch.long)
        for routing in ({}, {"selected": torch.tensor([[0]]), "token_to_case": none}, {"route": torch.empty(0, 1)}):
            assert ops.extra_neurons(x, *parts, act="relu", **routing).shape == x.shape
            ops.extra_neurons_(x, x, *parts, act="relu", **routing)
        base = [t.to(dtype) for t in (torch.randn(9, 8), torch.randn(9), torch.randn(8, 9), torch.randn(8))]
        assert ops.augmented_ffn(x, *base, *parts, act="relu").shape == x.shape
        assert ops.cosine_topk(x, parts[0], 3)[1].shape == (*x.shape[:-1], 3)
    assert ops.cosine_topk(torch.randn(2, 8), torch.empty(0, 8), 3)[1].tolist() == [[-1] * 3] * 2
    h, q, keys, values = shift_inputs(dtype)
    indices = torch.zeros(0, 2, dtype=torch.long)
    out, used = ops.knowledge_shift(h[:0], q[:0], keys, values, indices)
    assert out.shape == (0, 8) and used.shape == (0,)
    cases = {"token_to_case": torch.empty(0, dtype=torch.long), "case_tokens": torch.tensor([-1])}
    out, used = ops.knowledge_shift(h[:0], q[:0], keys, values, torch.tensor([[1, 2]]), **cases)
    assert out.shape == (0, 8) and used.tolist() == [0]


def test_nothing_selected_has_gradients():
    """Also where the output does not depend on the one tensor that wants a gradient."""
    for wanted in range(3):
        parts = [part.requires_grad_(i == wanted) for i, part in enumerate(neurons())]
        y = ops.extra_neurons(torch.randn(2, 8), *parts, act="relu", selected=torch.full((2, 1), -1))
        (gradient,) = torch.autograd.grad(y.sum(), parts[wanted])
        assert torch.equal(gradient, torch.zeros_like(parts[wanted]))


def test_no_tokens_have_gradients():
    parts = [part.requires_grad_() for part in neurons()]
    x = torch.empty(0, 8, requires_grad=True)
    y = ops.extra_neurons(x, *parts, act="relu", selected=torch.empty(0, 1, dtype=torch.long))
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(y.sum(), [x, *parts]))
