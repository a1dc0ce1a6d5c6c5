"""What every implementation of `knowledge_shift` has to pass: inputs, the comparison with the reference in float64, and
the bodies of the tests, which a test file of each backend runs at the sizes that its kernels take.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from kernel_tools import DEVICE, launches, poisoned
from tolerance import assert_close_to_reference

import unike_kernels as uk
from unike_kernels import reference

Check = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# The paths that a body expects, which each backend translates into kernels and how often they start.
ONE, CASE_ALPHA = "one kernel", "alpha at the case token"

SHAPES = {
    "multi-head": {"heads": 4, "kv_heads": 4, "hd": 16, "hv": 16},
    "head size 80": {"heads": 2, "kv_heads": 2, "hd": 80, "hv": 80},
    "7 heads on 1": {"heads": 14, "kv_heads": 2, "hd": 16, "hv": 8},
    "odd sizes": {"heads": 6, "kv_heads": 3, "hd": 5, "hv": 7},
}


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


def on_cases(tokens, cases=3, k=5, items=9, **more):
    """Contiguous tokens of each case, some of none; the last case has no items."""
    owner = (torch.arange(tokens) * cases // max(tokens, 1)).clamp(max=cases - 1)
    owner[::7] = -1
    return {"indices": ids(cases, k, items), "token_to_case": owner.to(DEVICE), **more}


def case_tokens(owner, cases):
    at = [int((owner == c).nonzero()[-1]) if bool((owner == c).any()) else -1 for c in range(cases)]
    return torch.tensor(at, device=DEVICE)


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(wide(v) for v in value) if isinstance(value, (list, tuple)) else value


def checker(backend: str, starts: Callable[[Any], dict[str, int]]) -> Check:
    """check(parts, indices, path, **options): the backend's results are those of the reference, and it started the
    kernels that `starts` says for the path. Returns the results.
    """

    def check(parts, indices, path=None, **options):
        with launches() as counted, poisoned():
            h, used = uk.ops.knowledge_shift(*parts, indices, backend=backend, **options)
        if path is not None:
            assert dict(counted) == starts(path)
        wide_options = {name: wide(value) for name, value in options.items()}
        exact = reference.knowledge_shift(*wide(parts), indices, **wide_options)
        same = reference.knowledge_shift(*parts, indices, **options)
        assert_close_to_reference(h, exact[0], same[0], 2)
        assert_close_to_reference(used, exact[1], same[1], 2, scale=1.0)
        kept = (same[0] == parts[0]).all(-1)
        assert torch.equal(h[kept], parts[0][kept])
        return h, used

    return check


def given_alpha(check, shape, dtype):
    """Alpha per token and as a number, both orientations, soft-capped scores."""
    parts = inputs(3, **SHAPES[shape], dtype=dtype)
    indices = ids(3, 5)
    check(parts, indices, ONE, alpha=torch.tensor([0.3, 0.0, 0.7], device=DEVICE))
    check(parts, indices, ONE, alpha=0.4, orientation="input", scaling=0.5, softcap=2.0)


def items_of_a_case(check, tokens, dtype):
    """Tokens of a case share its items; alpha per case, and per token."""
    shape = SHAPES["7 heads on 1"] if tokens in (15, 65) else {"heads": 2, "kv_heads": 1}
    parts = inputs(tokens, **shape, dtype=dtype)
    options = on_cases(tokens)
    check(parts, path=ONE, alpha=torch.rand(3, device=DEVICE), **options)
    check(parts, path=ONE, alpha=torch.rand(tokens, device=DEVICE), **options)


def raw(check, tokens, dtype, every_option):
    """One head as wide as the hidden state: alpha per token and per case, computed and given; rescaled or not."""
    parts = inputs(tokens, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype)
    for rescale in (True, False) if every_option else ():
        for orientation in ("knowledge", "input"):
            check(parts, ids(tokens, 5), ONE, rescale=rescale, clamp=rescale, orientation=orientation)
    check(parts, ids(tokens, 5), ONE, alpha=0.6)
    options = on_cases(tokens)
    check(parts, path=ONE, clamp=False, **options)
    at = case_tokens(options["token_to_case"], 3)
    check(parts, path=CASE_ALPHA, case_tokens=at, clamp=False, **options)


def rows_known_before(check, tokens, dtype, every_option):
    """The raw form with the encoder's rows: alpha from another average than the one that is mixed in."""
    parts = inputs(tokens, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype)
    rows = torch.randn(9, 70).to(DEVICE, dtype)
    for rescale in (True, False) if every_option else (True,):
        for orientation in ("knowledge", "input"):
            options = {"rescale": rescale, "clamp": rescale, "orientation": orientation}
            _, used = check(parts, ids(tokens, 5), ONE, encoder_rows=rows, **options)
            assert len(used) == tokens
    check(parts, ids(tokens, 5), ONE, encoder_rows=rows, alpha=0.6)
    options = on_cases(tokens)
    check(parts, path=ONE, clamp=False, encoder_rows=rows, **options)


def any_number_of_items(check, k):
    parts = inputs(2, items=max(k, 1))
    check(parts, ids(2, k, items=max(k, 1)), ONE, alpha=0.5)


def views(check, parts, view):
    """Starts and strides that are no multiples of anything."""
    check([view(t) for t in parts], ids(3, 5), ONE, alpha=0.5)


def rows_that_are_not_retrieved_do_not_leak(backend, tokens, orientation, raw, encoder):
    """NaN in an item and a token that nobody asks for, tokens of no case, cases of no item, negative zero."""
    untouched = 0.0 if orientation == "knowledge" else 1.0
    h, q, keys, values = inputs(tokens, heads=1, kv_heads=1, hd=64, hv=64) if raw else inputs(tokens)
    h[0] = math.nan  # a token of no case: passes as it is
    h[1, 0] = -0.0
    keys[0] = values[0] = math.nan
    cases = torch.full((tokens,), 2, device=DEVICE)
    cases[:5] = torch.tensor([-1, 1, 0, 2, -1])
    indices = torch.tensor([[1, 2], [-1, -1], [4, -1]], device=DEVICE)
    at = torch.tensor([2, 1, -1], device=DEVICE)
    forms = [{"alpha": 0.5}]
    forms += [{"case_tokens": at}] if raw or encoder else []
    forms += [{"encoder": encoder}] if encoder else []
    for options in forms:
        with poisoned():
            out, used = uk.ops.knowledge_shift(
                h, q, keys, values, indices, token_to_case=cases, clamp=False, orientation=orientation,
                backend=backend, **options,
            )  # fmt: skip
        acts = (cases == 0) | ((cases == 2) & ("case_tokens" not in options))
        assert out[1:].isfinite().all() and out[0].isnan().all() and used.isfinite().all()
        assert torch.equal(out[1:][~acts[1:]], h[1:][~acts[1:]]) and out[1, 0].signbit()
        assert not (out[acts] == h[acts]).all(-1).any()
        per_token = used if len(used) == tokens else torch.where(cases >= 0, used[cases], untouched)
        assert torch.equal(per_token != untouched, acts)


def alpha_0_keeps_the_input_whatever_is_known(backend):
    h, q, keys, values = inputs(3)
    values.fill_(math.nan)
    for alpha, orientation in ((0.0, "knowledge"), (1.0, "input")):
        out, used = uk.ops.knowledge_shift(
            h, q, keys, values, ids(3, 5), alpha=alpha, orientation=orientation, backend=backend
        )
        assert torch.equal(out, h) and used.eq(alpha).all()


def no_tokens_and_zero_vectors(check):
    parts = inputs(0)
    assert check(parts, ids(0, 2), alpha=0.5)[0].shape == (0, 64)
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert check(parts, ids(2, 2), token_to_case=none, alpha=0.5)[1].shape == (2,)
    raw = inputs(4, heads=1, kv_heads=1, hd=32, hv=32)
    raw[0][0] = 0
    raw[3].zero_()
    check(raw, ids(4, 3), orientation="input")
    check(inputs(2, items=0), torch.zeros(2, 3, dtype=torch.long, device=DEVICE), alpha=0.5)
