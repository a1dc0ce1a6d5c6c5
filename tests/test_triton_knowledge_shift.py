"""The Triton kernels of `knowledge_shift` against the reference in float64, on every path that they have."""

import pytest
import shift_bodies as bodies
import torch
from kernel_tools import DEVICE, DTYPES, shifted, strided
from shift_bodies import CASE_ALPHA, ONE, SHAPES, case_tokens, ids, inputs, layer, on_cases

import unike_kernels as uk

BF16, F16 = torch.bfloat16, torch.float16
ATTEND, LINEAR, MIX = "knowledge_shift_attend", "knowledge_shift_linear", "knowledge_shift_mix"
PROJECT, CASES = "knowledge_shift_project", "knowledge_shift_cases"
PATHS = {ONE: {ATTEND: 1}, CASE_ALPHA: {CASES: 1}}
check = bodies.checker("triton", lambda path: PATHS[path] if isinstance(path, str) else path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_alpha_is_one_launch(shape, dtype):
    bodies.given_alpha(check, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 128])
def test_items_of_a_case(tokens, dtype):
    bodies.items_of_a_case(check, tokens, dtype)


@pytest.mark.parametrize(("tokens", "dtype"), [*((3, dtype) for dtype in DTYPES), (1, F16), (66, BF16)], ids=str)
def test_raw_is_one_launch(tokens, dtype):
    bodies.raw(check, tokens, dtype, every_option=tokens < 64)


@pytest.mark.parametrize(
    ("act", "tokens", "weight_dtype"),
    [("silu", 17, dtype) for dtype in DTYPES] + [("identity", 1, F16), ("gelu", 66, BF16), ("relu", 16, BF16)],
    ids=str,
)
def test_projection_and_encoder(act, tokens, weight_dtype):
    parts = inputs(tokens, heads=4, kv_heads=2, hd=16, hv=16, d=72, dtype=weight_dtype)
    encoder = [layer(40, 72, weight_dtype), layer(72, 40, weight_dtype, bias=False)]
    out_proj = layer(72, 64, weight_dtype)
    options = {"encoder": encoder, "encoder_act": act, "out_proj": out_proj, "clamp": False}
    check(parts, ids(tokens, 5), {ATTEND: 1, LINEAR: 3, MIX: 1}, **options)
    cases = on_cases(tokens)
    at = case_tokens(cases["token_to_case"], 3)
    check(parts, path={ATTEND: 1, LINEAR: 3, MIX: 1}, case_tokens=at, **cases, **options)
    check(parts, path={PROJECT: 1}, alpha=torch.rand(3, device=DEVICE), **cases, **options)
    check(parts, path={PROJECT: 1}, out_proj=out_proj, case_tokens=at, **cases)
    check(parts, ids(tokens, 5), {PROJECT: 1}, out_proj=out_proj, clamp=False)


@pytest.mark.parametrize(("tokens", "dtype"), [*((3, dtype) for dtype in DTYPES), (1, F16), (17, BF16), (66, BF16)])
def test_rows_of_the_encoder_are_one_launch(tokens, dtype):
    bodies.rows_known_before(check, tokens, dtype, every_option=tokens < 16)


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize(("tokens", "dtype"), [*((3, dtype) for dtype in DTYPES), (1, F16), (16, BF16), (17, BF16)])
def test_folded_weights_are_one_launch(tokens, dtype, orientation):
    """Several tiles of columns, and from 17 tokens on of tokens; widths that no block divides."""
    parts = inputs(tokens, **SHAPES["7 heads on 1"], d=150, dtype=dtype)
    out_proj, folded = layer(150, 14 * 8, dtype), layer(150, 14 * 8, dtype, bias=tokens > 1)
    options = {"out_proj": out_proj, "folded": folded, "orientation": orientation}
    check(parts, ids(tokens, 5), {PROJECT: 1}, clamp=tokens == 3, **options)
    check(parts, path={PROJECT: 1}, clamp=False, **on_cases(tokens), **options)


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("tokens", [0, 3, 65, 130])
def test_what_is_known_of_the_encoder_where_alpha_is_a_cases(tokens, orientation):
    """More cases than tokens too; cases without a token, without an item, tokens of no case."""
    parts = inputs(tokens, d=72)
    options = {"out_proj": layer(72, 64), "folded": layer(72, 64), "clamp": False, "orientation": orientation}
    for count in (3, 37):
        cases = on_cases(tokens, count)
        at = case_tokens(cases["token_to_case"], count)
        check(parts, path={PROJECT: 1}, case_tokens=at, **cases, **options)
        check(parts, path={PROJECT: 1}, **cases, **options, alpha=torch.rand(count, device=DEVICE))
        check(parts, path={PROJECT: 1}, **cases, **options)  # an alpha of each token
        if tokens:
            check(parts, path={PROJECT: 1}, **cases, **options, alpha=torch.rand(tokens, device=DEVICE))
    check(parts, ids(tokens, 5), {PROJECT: 1}, alpha=torch.rand(tokens, device=DEVICE), **options)


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize(("tokens", "dtype"), [(0, F16), (3, BF16), (65, torch.float32), (130, F16)], ids=str)
def test_one_head_where_alpha_is_a_cases_is_one_launch(tokens, dtype, orientation):
    """More cases than tokens too; Enc the identity, or its rows known before."""
    parts = inputs(tokens, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype)
    for count in (13, 37):
        cases = on_cases(tokens, count)
        at = case_tokens(cases["token_to_case"], count)
        options = {"case_tokens": at, "clamp": False, "orientation": orientation, **cases}
        check(parts, path=CASE_ALPHA, **options)
        check(parts, path=CASE_ALPHA, encoder_rows=torch.randn(9, 70).to(DEVICE, dtype), rescale=count == 13, **options)


def test_what_is_known_in_other_dtypes_and_views():
    h, *rest = inputs(3)
    weight, bias = layer(64, 64)
    for view in (shifted, strided):
        known = {"out_proj": (view(weight), shifted(bias)), "folded": (view(weight.to(BF16)), None)}
        check([view(t) for t in (h.to(F16), *rest)], ids(3, 5), {PROJECT: 1}, clamp=False, **known)
        raw = [view(t) for t in inputs(3, heads=1, kv_heads=1, hd=33, hv=33)]
        check(raw, ids(3, 5), ONE, clamp=False, encoder_rows=view(torch.randn(9, 33).to(DEVICE, BF16)))
    known = {"out_proj": (weight.t(), bias), "folded": (weight.t(), bias)}
    check([h, *rest], ids(3, 5), {PROJECT: 1}, clamp=False, **known)


def test_three_equal_runs_with_folded_weights():
    parts = inputs(5, d=300, dtype=BF16)
    options = {"indices": ids(5, 3), "out_proj": layer(300, 64, BF16), "folded": layer(300, 64, BF16)}
    first, *others = [uk.ops.knowledge_shift(*parts, backend="triton", **options) for _ in range(3)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("form", ["encoder_rows", "folded"])
def test_precomputed_encoders_have_no_gradient_kernels(form):
    parts, known = inputs(2, d=64), {"folded": layer(64, 64), "out_proj": layer(64, 64)}
    if form == "encoder_rows":
        parts = inputs(2, heads=1, kv_heads=1, hd=64, hv=64)
        known = {"encoder_rows": torch.randn(9, 64, device=DEVICE)}
    out, _ = uk.ops.knowledge_shift(parts[0].requires_grad_(), *parts[1:], ids(2, 3), backend="triton", **known)
    with pytest.raises(ValueError, match="no gradients through encoder_rows or folded weights: give it the encoder"):
        out.sum().backward()


@pytest.mark.parametrize("k", [0, 1, 16, 17, 128])
def test_any_number_of_items(k):
    bodies.any_number_of_items(check, k)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_mixed_dtypes_and_views(dtypes):
    h, q, keys, values = inputs(3)
    parts = [h.to(dtypes[0]), q.to(dtypes[1]), keys.to(dtypes[0]), values.to(dtypes[1])]
    check(parts, ids(3, 5), ONE, alpha=0.5)
    for view in (shifted, strided):
        bodies.views(check, parts, view)
        seen = [view(t) for t in parts]
        weight, bias = layer(64, 64)
        proj = (view(weight), shifted(bias))
        check(seen, ids(3, 5), {ATTEND: 1, LINEAR: 2, MIX: 1}, out_proj=proj, encoder=[proj], clamp=False)
    check(parts, ids(3, 5), out_proj=(weight.t(), bias))


@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("tokens", [6, 80])
def test_rows_that_are_not_retrieved_do_not_leak(tokens, orientation):
    bodies.rows_that_are_not_retrieved_do_not_leak("triton", tokens, orientation, False, [layer(64, 64)])


def test_alpha_0_keeps_the_input_whatever_is_known():
    bodies.alpha_0_keeps_the_input_whatever_is_known("triton")


def test_no_tokens_and_zero_vectors():
    bodies.no_tokens_and_zero_vectors(check)
    none, at = torch.zeros(0, dtype=torch.long, device=DEVICE), torch.tensor([-1, -1], device=DEVICE)
    options = {"token_to_case": none, "case_tokens": at, "out_proj": layer(64, 64)}
    assert check(inputs(0), ids(2, 2), **options)[1].tolist() == [0, 0]


def test_many_cases_in_one_tile_and_three_equal_runs():
    parts = inputs(70, kv_heads=4, dtype=torch.bfloat16)
    owner = torch.randint(-1, 12, (70,), device=DEVICE)
    options = {"indices": ids(12, 3), "token_to_case": owner, "out_proj": layer(64, 64, torch.bfloat16)}
    first = check(parts, **options)
    for _ in range(2):
        again = uk.ops.knowledge_shift(*parts, backend="triton", **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_too_many_items_are_refused():
    with pytest.raises(ValueError, match="up to 1024 items"):
        uk.ops.knowledge_shift(*inputs(1), ids(1, 5).expand(1, 5).repeat(1, 300), backend="triton")
