"""The reference against what is plainer still: loops, numbers worked out by hand, torch's own attention, identities."""

import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from tolerance import assert_close_to_reference

from unike_kernels import reference

ACTS = ["relu", "gelu", "gelu_tanh", "silu", "identity"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def neurons(n, d, gated=False, bias=True):
    """keys, key_bias, values and the keyword arguments of a gated group."""
    gate = {"up": randn(n, d), "up_bias": randn(n) if bias else None} if gated else {}
    return (randn(n, d), randn(n) if bias else None, randn(n, d)), gate


# ------------------------------------------------------------------------------------------- equations 1, 3 and 6


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="relu, gelu, gelu_tanh, silu, identity, but got 'swish'"):
        reference.activation("swish")


@pytest.mark.parametrize("act", ACTS)
def test_ffn_is_two_linear_layers(act):
    x, w_k, b_k, w_v, b_v = randn(2, 3, 4), randn(7, 4), randn(7), randn(4, 7), randn(4)
    fc1, fc2 = torch.nn.Linear(4, 7).double(), torch.nn.Linear(7, 4).double()
    fc1.weight.data, fc1.bias.data, fc2.weight.data, fc2.bias.data = w_k, b_k, w_v, b_v
    expected = fc2(reference.activation(act)(fc1(x)))
    torch.testing.assert_close(reference.ffn(x, w_k, b_k, w_v, b_v, act=act), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_equation_3_is_an_ffn_of_concatenated_weights(gated, bias):
    x = randn(2, 3, 4)
    w_k, b_k, w_v, b_v = randn(7, 4), randn(7) if bias else None, randn(4, 7), randn(4)
    base = {"w_up": randn(7, 4), "b_up": randn(7) if bias else None} if gated else {}
    (keys, key_bias, values), gate = neurons(5, 4, gated, bias)

    def joined(a, b):
        return None if a is None else torch.cat([a, b])

    both = {"w_up": joined(base["w_up"], gate["up"]), "b_up": joined(base["b_up"], gate["up_bias"])} if gated else {}
    expected = reference.ffn(
        x, joined(w_k, keys), joined(b_k, key_bias), torch.cat([w_v, values.T], dim=1), b_v, act="silu", **both
    )
    actual = reference.augmented_ffn(x, w_k, b_k, w_v, b_v, keys, key_bias, values, act="silu", **base, **gate)
    torch.testing.assert_close(actual, expected)
    apart = reference.ffn(x, w_k, b_k, w_v, b_v, act="silu", **base)
    apart = apart + reference.extra_neurons(x, keys, key_bias, values, act="silu", **gate)
    torch.testing.assert_close(apart, expected)


def test_equation_6_adds_zeta_to_every_value_and_beta_0_is_equation_3():
    x, zeta = randn(3, 4), randn(4)
    (keys, key_bias, values), _ = neurons(5, 4)
    three = reference.extra_neurons(x, keys, key_bias, values, act="relu")
    assert torch.equal(reference.extra_neurons(x, keys, key_bias, values, act="relu", zeta=zeta, beta=0.0), three)
    six = reference.extra_neurons(x, keys, key_bias, values, act="relu", zeta=zeta, beta=0.7)
    torch.testing.assert_close(six, torch.relu(x @ keys.T + key_bias) @ (values + 0.7 * zeta))
    assert not torch.allclose(six, three)


def by_loops(x, keys, key_bias, values, *, act, up, up_bias, zeta, beta, group_ptr, route, token_to_case, selected):
    """The sum over groups, token by token and group by group: [T, d_out]."""
    y = torch.zeros(len(x), values.shape[1], dtype=x.dtype)
    for t in range(len(x)):
        case = t if token_to_case is None else int(token_to_case[t])
        for g in range(len(group_ptr) - 1):
            r = 1.0
            if route is not None or selected is not None:
                r = 0.0 if case < 0 else 1.0 if route is None else route[case, g]
                if selected is not None and case >= 0 and g not in selected[case].tolist():
                    r = 0.0
            for i in range(int(group_ptr[g]), int(group_ptr[g + 1])) if r != 0 else ():
                o = reference.activation(act)(x[t] @ keys[i] + key_bias[i])
                o = o * (x[t] @ up[i] + up_bias[i]) if up is not None else o
                y[t] += r * o * (values[i] + beta * (zeta[g] if zeta.dim() == 2 else zeta))
    return y


@st.composite
def routings(draw):
    """Groups of any sizes with spare neurons at the end, and a way of choosing among them for 6 tokens."""
    sizes = draw(st.lists(st.integers(0, 3), max_size=4))
    tokens, groups = 6, len(sizes)
    pointers = torch.tensor([0, *sizes]).cumsum(0)
    cases = draw(st.none() | st.integers(1, 3))
    to_case = None
    if cases is not None:
        to_case = torch.tensor(draw(st.lists(st.integers(-1, cases - 1), min_size=tokens, max_size=tokens)))
    rows = tokens if cases is None else cases
    route = selected = None
    if draw(st.booleans()):
        weights = st.sampled_from([0.0, 1.0, 0.25])
        row = st.lists(weights, min_size=groups, max_size=groups)
        route = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64).view(rows, groups)
    if draw(st.booleans()):
        row = st.lists(st.integers(-1, groups - 1), min_size=2, max_size=2)
        selected = torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows))).view(rows, 2)
    return {"group_ptr": pointers, "route": route, "token_to_case": to_case, "selected": selected}


@given(routing=routings(), gated=st.booleans(), zeta_per_group=st.booleans(), spare=st.integers(0, 2))
def test_groups_are_what_loops_give(routing, gated, zeta_per_group, spare):
    torch.manual_seed(0)
    n, groups = int(routing["group_ptr"][-1]), len(routing["group_ptr"]) - 1
    (keys, key_bias, values), gate = neurons(n + spare, 4, gated)
    for tensor in (keys, key_bias, values, *gate.values()):
        tensor[n:] = math.nan  # spare capacity is never read
    zeta = randn(groups, 4) if zeta_per_group else randn(4)
    x, rest = randn(6, 4), {"act": "silu", "up": None, "up_bias": None, "zeta": zeta, "beta": 0.5, **gate, **routing}
    torch.testing.assert_close(
        reference.extra_neurons(x, keys, key_bias, values, **rest), by_loops(x, keys, key_bias, values, **rest)
    )


def test_equal_groups_in_one_batched_product_are_what_they_are_one_by_one():
    (keys, key_bias, values), gate = neurons(12, 4, gated=True)
    x, ptr = randn(4, 5, 4), torch.arange(0, 13, 3)
    selected, cases = torch.tensor([[2], [0], [3], [1]]), torch.arange(4).repeat_interleave(5)
    options = {"act": "silu", "group_ptr": ptr, "selected": selected, **gate}
    together = reference.extra_neurons(x, keys, key_bias, values, token_to_case=cases, **options)
    uneven = torch.where(torch.arange(20) == 7, -1, cases)  # one token fewer in a case: the products are made apart
    apart = reference.extra_neurons(x, keys, key_bias, values, token_to_case=uneven, **options)
    assert apart.view(20, 4)[7].eq(0).all()
    kept = torch.arange(20) != 7
    torch.testing.assert_close(together.view(20, 4)[kept], apart.view(20, 4)[kept])


def test_group_order_does_not_matter():
    sizes = [2, 0, 3, 1]
    (keys, key_bias, values), _ = neurons(6, 4)
    x, route = randn(5, 4), torch.rand(5, 4, dtype=torch.float64)
    order = [2, 3, 0, 1]
    parts = [t.split(sizes) for t in (keys, key_bias, values)]
    moved = [torch.cat([part[g] for g in order]) for part in parts]
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    moved_ptr = torch.tensor([0, *(sizes[g] for g in order)]).cumsum(0)
    for weights, moved_weights in ((None, None), (route, route[:, order])):
        a = reference.extra_neurons(x, keys, key_bias, values, act="gelu", group_ptr=ptr, route=weights)
        b = reference.extra_neurons(x, *moved, act="gelu", group_ptr=moved_ptr, route=moved_weights)
        torch.testing.assert_close(a, b)


def test_an_index_out_of_range_is_an_error():
    (keys, key_bias, values), _ = neurons(4, 4)
    x, ptr, cases = randn(2, 4), torch.tensor([0, 2, 4]), torch.tensor([0, 1])
    for selected, to_case in ((torch.tensor([[2], [0]]), cases), (torch.tensor([[1], [0]]), cases + 1)):
        with pytest.raises(IndexError):
            reference.extra_neurons(
                x, keys, key_bias, values, act="relu", group_ptr=ptr, selected=selected, token_to_case=to_case
            )


# ------------------------------------------------------------------------------------------- equations 2, 7, 8 and 9


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_knowledge_attention_is_attention(kv_heads):
    q, keys, values = randn(5, 4, 8), randn(9, kv_heads, 8), randn(9, kv_heads, 3)
    indices = torch.stack([torch.randperm(9)[:6] for _ in range(5)])
    k, v = (t[indices].transpose(1, 2).repeat_interleave(4 // kv_heads, dim=1) for t in (keys, values))
    expected = F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]
    torch.testing.assert_close(reference.knowledge_attention(q, keys, values, indices), expected)
    expected = F.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.3)[:, :, 0]
    torch.testing.assert_close(reference.knowledge_attention(q, keys, values, indices, scaling=0.3), expected)


def test_knowledge_attention_raw_is_equation_2():
    q, items, indices = randn(3, 8), randn(6, 8), torch.tensor([[0, 1, 2], [5, 4, -1], [3, -1, -1]])
    expected = torch.stack(
        [
            torch.softmax(items[kept] @ q[t] / math.sqrt(8), dim=0) @ items[kept]
            for t, kept in enumerate(([0, 1, 2], [5, 4], [3]))
        ]
    )
    torch.testing.assert_close(reference.knowledge_attention(q, items, items, indices), expected)


def test_knowledge_attention_softcap_bounds_the_scores():
    q, keys, values = 100 * randn(2, 1, 4), randn(5, 1, 4), randn(5, 1, 4)
    indices = torch.arange(5).expand(2, 5)
    s = 3 * torch.tanh(torch.einsum("thd,khd->tk", q, keys) / 2 / 3)
    expected = s.softmax(-1) @ values[:, 0]
    torch.testing.assert_close(reference.knowledge_attention(q, keys, values, indices, softcap=3.0)[:, 0], expected)


@pytest.mark.parametrize("cases", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 2, 1], [0, -1, 2, 2, -1, 2], [-1] * 6])
def test_knowledge_attention_per_case_is_per_token_with_the_items_repeated(cases):
    q, keys, values = randn(6, 4, 8), randn(9, 2, 8), randn(9, 2, 8)
    keys[0] = values[0] = math.nan  # the row read where there is no item must not leak
    indices = torch.tensor([[1, 2, 3], [4, -1, -1], [-1, -1, -1]])
    cases = torch.tensor(cases)
    per_token = torch.where(cases[:, None] >= 0, indices[cases.clamp(min=0)], -1)
    expected = reference.knowledge_attention(q, keys, values, per_token)
    actual = reference.knowledge_attention(q, keys, values, indices, token_to_case=cases)
    torch.testing.assert_close(actual, expected)
    assert actual[(per_token < 0).all(-1)].eq(0).all()


@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.7, None), (0.7, 1.5)])
def test_equations_8_and_9_the_share_mixes_two_attentions_into_one(scaling, softcap):
    options = {"scaling": scaling, "softcap": softcap}
    tokens, length, heads, kv_heads, size = 4, 7, 6, 2, 8
    q, q_rotated = randn(tokens, heads, size), randn(tokens, heads, size)
    item_keys, item_values = randn(5, kv_heads, size), randn(5, kv_heads, size)
    input_keys, input_values = randn(length, kv_heads, size), randn(length, kv_heads, size)
    items = torch.arange(5).expand(tokens, 5)
    causal = [torch.arange(length) <= length - tokens + t for t in range(tokens)]

    def repeated(t):
        return t.repeat_interleave(heads // kv_heads, dim=1)

    share = reference.softmax_share(q, item_keys, input_keys, items, q_input=q_rotated, **options)
    know = reference.knowledge_attention(q, item_keys, item_values, items, **options)
    for t, seen in enumerate(causal):
        own = torch.where(seen, torch.arange(length), -1)[None]
        inputs = reference.knowledge_attention(q_rotated[t, None], input_keys, input_values, own, **options)[0]
        mixed = share[t, :, None] * know[t] + (1 - share[t, :, None]) * inputs
        # One softmax over [items, visible input]; memory pairs meet the unrotated query, input pairs the rotated one.
        scores = torch.cat(
            [
                torch.einsum("hd,khd->hk", q[t], repeated(item_keys)),
                torch.einsum("hd,khd->hk", q_rotated[t], repeated(input_keys[seen])),
            ],
            dim=1,
        )
        scores = scores * (size**-0.5 if scaling is None else scaling)
        weights = torch.softmax(scores if softcap is None else softcap * torch.tanh(scores / softcap), dim=1)
        values = torch.cat([repeated(item_values), repeated(input_values[seen])])
        torch.testing.assert_close(mixed, torch.einsum("hk,khd->hd", weights, values), atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(weights[:, :5].sum(1), share[t])


def test_softmax_share_without_items_is_0_and_follows_the_mask():
    q, keys, inputs = randn(2, 2, 4), randn(3, 2, 4), randn(2, 2, 4)
    assert reference.softmax_share(q, keys, inputs, torch.full((2, 3), -1)).eq(0).all()
    assert reference.softmax_share(q, keys[:0], inputs, torch.empty(2, 0, dtype=torch.long)).eq(0).all()
    some = torch.tensor([[0, -1], [2, 1]])
    full = torch.ones(2, 2, dtype=torch.bool)
    assert (reference.softmax_share(q, keys, inputs, some, visible=full)[0] < 1).all()
    causal = reference.softmax_share(q, keys, inputs, some)
    torch.testing.assert_close(causal, reference.softmax_share(q, keys, inputs, some, visible=full.tril()))
    assert not torch.allclose(causal, reference.softmax_share(q, keys, inputs, some, visible=full))


def test_alpha_is_the_clamped_cosine_of_the_encoded_knowledge():
    h_know, h_input = randn(6, 4), randn(6, 4)
    h_know[4], h_input[5] = 0, 0
    layers = [(randn(3, 4), randn(3)), (randn(4, 3), None)]
    encoded = torch.relu(h_know @ layers[0][0].T + layers[0][1]) @ layers[1][0].T
    expected = F.cosine_similarity(encoded, h_input)
    actual = reference.alpha(h_know, h_input, encoder=layers, act="relu", clamp=False)
    torch.testing.assert_close(actual, expected)
    assert actual.min() < 0
    torch.testing.assert_close(reference.alpha(h_know, h_input, encoder=layers, act="relu"), expected.clamp(0, 1))
    own = reference.alpha(h_know, h_input, encoder=lambda h: 2 * h, clamp=False)
    torch.testing.assert_close(own, reference.alpha(h_know, h_input, clamp=False))
    assert own[4] == own[5] == 0


def test_shift_has_two_orientations():
    h_input, h_know, alpha = randn(3, 4), randn(3, 4), torch.tensor([0.25, 0.5, 1.0]).double()
    a = alpha[:, None]
    torch.testing.assert_close(reference.shift(h_input, h_know, alpha), (1 - a) * h_input + a * h_know)
    letter = reference.shift(h_input, h_know, alpha, orientation="input")
    torch.testing.assert_close(letter, a * h_input + (1 - a) * h_know)
    torch.testing.assert_close(reference.shift(h_input, h_know, 0.25), 0.75 * h_input + 0.25 * h_know)
    with pytest.raises(ValueError, match="'knowledge' or 'input', but got 'alpha'"):
        reference.shift(h_input, h_know, alpha, orientation="alpha")


@pytest.mark.parametrize(("orientation", "none"), [("knowledge", 0.0), ("input", 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_without_weight_keeps_every_bit_and_no_gradient_of_what_it_skips(dtype, orientation, none):
    h_input = randn(4, 8).to(dtype)
    h_input[0, 0] = -0.0
    h_know = torch.full((4, 8), math.nan, dtype=dtype)
    for leaf in (h_input, h_know):
        leaf.requires_grad_()
    assert torch.equal(reference.shift(h_input, h_know, none, orientation=orientation), h_input)
    alpha = torch.full((4,), none, requires_grad=True)
    h = reference.shift(h_input, h_know, alpha, orientation=orientation)
    assert torch.equal(h, h_input) and h[0, 0].signbit()
    for grad, wanted in zip(torch.autograd.grad(h.sum(), [h_input, h_know, alpha]), (1, 0, 0), strict=True):
        assert grad.eq(wanted).all()


def test_rescale_takes_the_norm_of_the_input():
    h_know, h_input = randn(3, 4), randn(3, 4)
    h_know[2] = 0
    scaled = reference.rescale(h_know, h_input)
    torch.testing.assert_close(scaled[:2].norm(dim=1), h_input[:2].norm(dim=1))
    torch.testing.assert_close(F.cosine_similarity(scaled[:2], h_know[:2]), torch.ones(2).double())
    assert scaled[2].eq(0).all()


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("form", ["projected", "raw"])
def test_knowledge_shift_is_its_parts(form, orientation):
    h, indices, encoder = randn(3, 8), torch.tensor([[0, 1], [2, -1], [4, 3]]), [(randn(8, 8), randn(8))]
    if form == "projected":
        q, keys, values, out_proj = randn(3, 4, 2), randn(5, 2, 2), randn(5, 2, 3), (randn(8, 12), randn(8))
        know = F.linear(reference.knowledge_attention(q, keys, values, indices).flatten(1), *out_proj)
    else:
        q, keys, out_proj = randn(3, 8), randn(5, 8), None
        values = keys
        know = reference.knowledge_attention(q, keys, values, indices)
    alpha = reference.alpha(know, h, encoder=encoder, clamp=False)  # before rescaling
    options = {"encoder": encoder, "orientation": orientation, "clamp": False, "out_proj": out_proj}
    for rescale in (True, False):
        mixed = reference.rescale(know, h) if rescale and form == "raw" else know
        out, used = reference.knowledge_shift(h, q, keys, values, indices, rescale=rescale, **options)
        torch.testing.assert_close(used, alpha)
        torch.testing.assert_close(out, reference.shift(h, mixed, alpha, orientation=orientation))


# ------------------------------------------------------------------------------------------------------ derivatives


def test_second_and_forward_mode_derivatives():
    """The operators are differentiable once, and backward; they send users here for more."""
    x, keys, key_bias, values = randn(4, 3), randn(5, 3), randn(5), randn(5, 3)
    leaves = [t.requires_grad_() for t in (x, keys, key_bias, values)]
    ptr, selected = torch.tensor([0, 2, 5]), torch.tensor([[0], [1], [1], [-1]])

    def run(*leaves):
        return reference.extra_neurons(*leaves, act="silu", group_ptr=ptr, selected=selected)

    assert torch.autograd.gradgradcheck(run, leaves)
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)


def test_a_zero_vector_has_a_gradient_that_is_finite():
    h_know, h_input = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    out = reference.alpha(h_know, h_input, clamp=False).sum() + reference.rescale(h_know, h_input).sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, [h_know, h_input]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Bit for bit what float32 gives, rounded at the end; and a tolerance that this earns."""
    x, w_k, b_k, w_v, b_v = (randn(*s).to(dtype) for s in ((5, 8), (32, 8), (32,), (8, 32), (8,)))
    once = reference.ffn(*(t.float() for t in (x, w_k, b_k, w_v, b_v)), act="gelu").to(dtype)
    actual = reference.ffn(x, w_k, b_k, w_v, b_v, act="gelu")
    assert torch.equal(actual, once)
    in_64 = reference.ffn(*(t.double() for t in (x, w_k, b_k, w_v, b_v)), act="gelu")
    assert_close_to_reference(actual, in_64, once, 1)
    with pytest.raises(AssertionError, match="allowed"):  # the tolerance has teeth
        assert_close_to_reference(actual + 0.05 * actual.abs().max(), in_64, once, 2)


def test_retrieve_and_shift_is_the_search_and_the_shift_of_every_token():
    """Own items: as if the memory held, behind its own, those of the case's edits alone."""
    generator = torch.Generator().manual_seed(0)
    rand = partial(torch.randn, dtype=torch.float64, generator=generator)
    h_input, q, keys, values, tap, sem = rand(4, 8), rand(4, 2, 3), rand(9, 2, 3), rand(9, 2, 4), rand(4, 5), rand(9, 5)
    spans, alpha = torch.tensor([[0, 5], [0, 8]]), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    args = (h_input, q, keys, values, tap, sem, 3)

    h, used, scores, indices = reference.retrieve_and_shift(*args, spans=spans, alpha=alpha)
    found = reference.cosine_topk(tap, sem[:8], 3)
    assert torch.equal(scores, found[0]) and torch.equal(indices, found[1]) and torch.equal(used, alpha)
    assert torch.equal(h, reference.knowledge_shift(h_input, q, keys, values, indices, alpha=alpha)[0])

    token_to_case, selected = torch.tensor([0, 1, -1, 2]), torch.tensor([[2, -1], [0, 1], [-1, -1]])
    routed = {"token_to_case": token_to_case, "selected": selected}
    h, used, scores, indices = reference.retrieve_and_shift(*args, spans=spans, alpha=alpha, **routed)
    for token, rows in ((0, [0, 1, 2, 3, 4, 7]), (1, [0, 1, 2, 3, 4, 5, 6])):
        best, place = reference.cosine_topk(tap[token], sem[rows], 3)
        torch.testing.assert_close(scores[token], best)
        assert indices[token].tolist() == [rows[i] for i in place.tolist()]
    for token in (2, 3):  # of no case, and of one without an edit
        assert (indices[token] == -1).all() and torch.equal(h[token], h_input[token]) and used[token] == 0.0
