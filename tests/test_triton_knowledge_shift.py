"""The Triton kernels of `knowledge_shift` against the reference in float64, on every path that they have."""

import math

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from tolerance import assert_close_to_reference

import unike_kernels as uk
from unike_kernels import reference

BF16, F16 = torch.bfloat16, torch.float16
ATTEND, LINEAR, MIX = "knowledge_shift_attend", "knowledge_shift_linear", "knowledge_shift_mix"


def inputs(tokens, *, heads=4, kv_heads=2, hd=16, hv=16, items=9, d=None, dtype=torch.float32):
    """h_input, q, item_keys and item_values; one head: the raw form."""
    d = heads * hv if d is None else d
    q, keys, values = torch.randn(tokens, heads, hd), torch.randn(items, kv_heads, hd), torch.randn(items, kv_heads, hv)
    if heads == 1:
        q, keys, values = q[:, 0], keys[:, 0], values[:, 0]
    return [t.to(DEVICE, dtype) for t in (torch.randn(tokens, d), q, keys, values)]


def layer(out, into, dtype=torch.float32, bias=True):
    return (torch.randn(out, into) / math.sqrt(into)).to(DEVICE, dtype), (
        torch.randn(out).to(DEVICE, dtype) if bias else None
    )


def ids(rows, k, items=9):
    """Distinct items per row, some missing; the last row has none."""
    table = torch.stack([torch.randperm(items)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k).long()
    table[torch.rand(rows, k) < 0.2] = -1
    table[-1:] = -1
    return table.to(DEVICE)


def on_cases(tokens, cases=3, k=5, **more):
    """Contiguous tokens of each case, some of none; the last case has no items."""
    owner = (torch.arange(tokens) * cases // max(tokens, 1)).clamp(max=cases - 1)
    owner[::7] = -1
    return {"indices": ids(cases, k), "token_to_case": owner.to(DEVICE), **more}


def case_tokens(owner, cases):
    at = [int((owner == c).nonzero()[-1]) if bool((owner == c).any()) else -1 for c in range(cases)]
    return torch.tensor(at, device=DEVICE)


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(wide(v) for v in value) if isinstance(value, (list, tuple)) else value


def check(parts, indices, expected=None, **options):
    """The kernel's results are those of the reference; `expected`: the kernels that it starts."""
    with launches() as counted, poisoned():
        h, used = uk.ops.knowledge_shift(*parts, indices, backend="triton", **options)
    if expected is not None:
        assert dict(counted) == expected
    wide_options = {name: wide(value) for name, value in options.items()}
    exact = reference.knowledge_shift(*wide(parts), indices, **wide_options)
    same = reference.knowledge_shift(*parts, indices, **options)
    assert_close_to_reference(h, exact[0], same[0], 2)
    assert_close_to_reference(used, exact[1], same[1], 2)
    kept = (same[0] == parts[0]).all(-1)
    assert torch.equal(h[kept], parts[0][kept])
    return h, used


SHAPES = {
    "multi-head": {"heads": 4, "kv_heads": 4, "hd": 16, "hv": 16},
    "head size 80": {"heads": 2, "kv_heads": 2, "hd": 80, "hv": 80},
    "7 heads on 1": {"heads": 14, "kv_heads": 2, "hd": 16, "hv": 8},
    "odd sizes": {"heads": 6, "kv_heads": 3, "hd": 5, "hv": 7},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_alpha_is_one_launch(shape, dtype):
    parts = inputs(3, **SHAPES[shape], dtype=dtype)
    indices = ids(3, 5)
    check(parts, indices, {ATTEND: 1}, alpha=torch.tensor([0.3, 0.0, 0.7], device=DEVICE))
    check(parts, indices, {ATTEND: 1}, alpha=0.4, orientation="input", scaling=0.5, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 64, 65])
def test_items_of_a_case(tokens, dtype):
    shape = SHAPES["7 heads on 1"] if tokens in (15, 65) else {"heads": 2, "kv_heads": 1}
    parts = inputs(tokens, **shape, dtype=dtype)
    options = on_cases(tokens)
    alpha = torch.rand(3, device=DEVICE)
    check(parts, expected={ATTEND: 1}, alpha=alpha, **options)
    check(parts, expected={ATTEND: 1}, alpha=torch.rand(tokens, device=DEVICE), **options)


@pytest.mark.parametrize(("tokens", "dtype"), [*((3, dtype) for dtype in DTYPES), (1, F16), (66, BF16)], ids=str)
def test_raw_is_one_launch(tokens, dtype):
    parts = inputs(tokens, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype)
    for rescale in (True, False) if tokens < 64 else ():
        for orientation in ("knowledge", "input"):
            check(parts, ids(tokens, 5), {ATTEND: 1}, rescale=rescale, clamp=rescale, orientation=orientation)
    check(parts, ids(tokens, 5), {ATTEND: 1}, alpha=0.6)
    options = on_cases(tokens)
    check(parts, expected={ATTEND: 1}, clamp=False, **options)
    at = case_tokens(options["token_to_case"], 3)
    check(parts, expected={ATTEND: 1, MIX: 1}, case_tokens=at, clamp=False, **options)


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
    check(parts, expected={ATTEND: 1, LINEAR: 3, MIX: 1}, case_tokens=at, **cases, **options)
    check(parts, expected={ATTEND: 1, LINEAR: 1, MIX: 1}, alpha=torch.rand(3, device=DEVICE), **cases, **options)
    check(parts, expected={ATTEND: 1, LINEAR: 1, MIX: 1}, out_proj=out_proj, case_tokens=at, **cases)


@pytest.mark.parametrize("k", [0, 1, 16, 17, 128])
def test_any_number_of_items(k):
    parts = inputs(2, items=max(k, 1))
    check(parts, ids(2, k, items=max(k, 1)), {ATTEND: 1}, alpha=0.5)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_mixed_dtypes_and_views(dtypes):
    h, q, keys, values = inputs(3)
    parts = [h.to(dtypes[0]), q.to(dtypes[1]), keys.to(dtypes[0]), values.to(dtypes[1])]
    check(parts, ids(3, 5), {ATTEND: 1}, alpha=0.5)
    for view in (shifted, strided):
        seen = [view(t) for t in parts]
        check(seen, ids(3, 5), {ATTEND: 1}, alpha=0.5)
        weight, bias = layer(64, 64)
        proj = (view(weight), shifted(bias))
        check(seen, ids(3, 5), {ATTEND: 1, LINEAR: 2, MIX: 1}, out_proj=proj, encoder=[proj], clamp=False)
    check(parts, ids(3, 5), out_proj=(weight.t(), bias))


@pytest.mark.parametrize(("orientation", "untouched"), [("knowledge", 0.0), ("input", 1.0)])
def test_rows_that_are_not_retrieved_do_not_leak(orientation, untouched):
    for tokens in (6, 80):
        h, q, keys, values = inputs(tokens)
        h[0] = math.nan  # a token of no case: passes as it is
        h[1, 0] = -0.0
        keys[0] = values[0] = math.nan
        cases = torch.full((tokens,), 2, device=DEVICE)
        cases[:5] = torch.tensor([-1, 1, 0, 2, -1])
        indices = torch.tensor([[1, 2], [-1, -1], [4, -1]], device=DEVICE)
        encoder = [layer(64, 64)]
        for options in ({"alpha": 0.5}, {"case_tokens": torch.tensor([2, 1, -1], device=DEVICE)}, {"encoder": encoder}):
            with poisoned():
                out, used = uk.ops.knowledge_shift(
                    h, q, keys, values, indices, token_to_case=cases, clamp=False, orientation=orientation,
                    backend="triton", **options,
                )  # fmt: skip
            acts = (cases == 0) | ((cases == 2) & ("case_tokens" not in options))
            assert out[1:].isfinite().all() and out[0].isnan().all() and used.isfinite().all()
            assert torch.equal(out[1:][~acts[1:]], h[1:][~acts[1:]]) and out[1, 0].signbit()
            assert not (out[acts] == h[acts]).all(-1).any()
            per_token = used if len(used) == tokens else torch.where(cases >= 0, used[cases], untouched)
            assert torch.equal(per_token != untouched, acts)


def test_alpha_0_keeps_the_input_whatever_is_known():
    h, q, keys, values = inputs(3)
    values.fill_(math.nan)
    for alpha, orientation in ((0.0, "knowledge"), (1.0, "input")):
        out, used = uk.ops.knowledge_shift(
            h, q, keys, values, ids(3, 5), alpha=alpha, orientation=orientation, backend="triton"
        )
        assert torch.equal(out, h) and used.eq(alpha).all()


def test_no_tokens_and_zero_vectors():
    parts = inputs(0)
    assert check(parts, ids(0, 2), alpha=0.5)[0].shape == (0, 64)
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert check(parts, ids(2, 2), token_to_case=none, alpha=0.5)[1].shape == (2,)
    at = torch.tensor([-1, -1], device=DEVICE)
    assert check(parts, ids(2, 2), token_to_case=none, case_tokens=at, out_proj=layer(64, 64))[1].tolist() == [0, 0]
    raw = inputs(4, heads=1, kv_heads=1, hd=32, hv=32)
    raw[0][0] = 0
    raw[3].zero_()
    check(raw, ids(4, 3), orientation="input")
    check(inputs(2, items=0), torch.zeros(2, 3, dtype=torch.long, device=DEVICE))


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
