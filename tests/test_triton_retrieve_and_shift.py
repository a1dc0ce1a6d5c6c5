"""retrieve_and_shift: the two operators in one, in every form, for tokens of no case, routed ones and own items."""

import math

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from shift_bodies import inputs, layer, wide
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference

SCAN, ATTEND, PROJECT = "cosine_topk_scan", "knowledge_shift_attend", "knowledge_shift_project"
FORMS = ("given", "raw", "rows", "folded")


def case_of(form, tokens, dtype=torch.float32, *, shared=70, own=3, spare=4, d=24, k=5):
    """Positional arguments and options; the memory's rows, then own items, then rows that are not there (NaN)."""
    items = shared + own + spare
    if form in ("raw", "rows"):
        parts = inputs(tokens, heads=1, kv_heads=1, hd=33, hv=33, items=items, dtype=dtype)
        options = {"encoder_rows": torch.randn(items, 33).to(DEVICE, dtype)} if form == "rows" else {}
    else:
        parts = inputs(tokens, heads=6, kv_heads=2, hd=16, hv=8, items=items, d=150 if form == "folded" else None,
                       dtype=dtype)  # fmt: skip
        options = {"alpha": torch.linspace(0, 1, tokens, device=DEVICE)}
        if form == "folded":
            options = {"out_proj": layer(150, 48, dtype), "folded": layer(150, 48, dtype)}
    tap, sem = torch.randn(tokens, d).to(DEVICE, dtype), torch.randn(items, d).to(DEVICE, dtype)
    norm = sem.float().norm(dim=1)
    tables = (parts[2], parts[3], sem, norm, *(options[n] for n in ("encoder_rows",) if n in options))
    for table in tables:
        table[shared + own :] = math.nan
    spans = torch.tensor([[0, shared], [0, shared + own]], device=DEVICE)
    return [*parts, tap, sem, k], {"spans": spans, "sem_norm": norm, "clamp": False, **options}


def check(args, options):
    """The items are the reference's, and the rest what it makes of them, from poisoned memory."""
    with launches() as counted, poisoned():
        h, used, scores, indices = ops.retrieve_and_shift(*args, **options, backend="triton")
    if len(args[0]):
        scans = {SCAN: 1} if len(args[5]) else {}
        assert counted == {**scans, PROJECT if "out_proj" in options else ATTEND: 1}
    expected = ops.retrieve_and_shift(*args, **options, backend="reference")
    assert torch.equal(indices, expected[3])
    torch.testing.assert_close(scores, expected[2], rtol=0, atol=1e-6)
    names = ("alpha", "encoder_rows", "folded", "out_proj", "orientation", "clamp", "scaling", "softcap", "rescale")
    known = {name: options[name] for name in names if name in options}
    exact = reference.knowledge_shift(
        *wide(args[:4]), indices, **{name: wide(v) if name not in ("clamp",) else v for name, v in known.items()}
    )
    same = reference.knowledge_shift(*args[:4], indices, **known)
    assert_close_to_reference(h, exact[0], same[0], 2)
    assert_close_to_reference(used, exact[1], same[1], 2, scale=1.0)
    idle = (indices < 0).all(1)
    assert torch.equal(h[idle], args[0][idle])
    return h, used, scores, indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, dtype):
    check(*case_of(form, 3, dtype))


@pytest.mark.parametrize(
    ("form", "tokens"), [("given", 0), ("given", 1), ("given", 17), ("folded", 0), ("folded", 16), ("folded", 64)]
)
def test_any_number_of_tokens(form, tokens):
    args, options = case_of(form, tokens, shared=20, k=3)
    options |= {"orientation": "input"} if tokens == 17 else {}
    cases = torch.arange(tokens, device=DEVICE) % 3 - 1
    selected = torch.tensor([[0, -1], [2, 1]], device=DEVICE)
    check(args, {**options, "token_to_case": cases, "selected": selected})


@pytest.mark.parametrize("form", FORMS)
def test_own_items_and_who_retrieves_nothing(form):
    """Tokens of no case, of a case without edits; an edit whose own item is the best, is worse, or is not there."""
    args, options = case_of(form, 6)
    tap, sem = args[4], args[5]
    tap[0] = 3 * sem[70]  # the own item of edit 0
    tap[3] = -sem[72]
    cases = torch.tensor([0, 0, -1, 1, 2, 3], device=DEVICE)
    selected = torch.tensor([[0, 1, -1], [2, -1, -1], [-1, -1, -1], [-1, 9, 1]], device=DEVICE)
    h, used, scores, indices = check(args, {**options, "token_to_case": cases, "selected": selected})
    assert indices[0, 0] == 70 and 72 not in indices[3] and (indices[[2, 4]] == -1).all()
    assert torch.equal(h[[2, 4]], args[0][[2, 4]]) and h.isfinite().all()
    always = check(args, {**options, "token_to_case": cases})[3]
    assert always[0, 0] == 70 and (always[2] == -1).all() and (always[4] >= 0).all()
    for row, allowed in ((0, {70, 71}), (1, {70, 71}), (5, {71})):
        assert set(indices[row][indices[row] >= 70].tolist()) <= allowed


@pytest.mark.parametrize("slots", [4, 70])
def test_an_edit_that_is_named_twice_is_one(slots):
    """In neighbouring slots, in others, and in more of them than are kept."""
    args, options = case_of("given", 3)
    args[4][0] = args[5][70]  # the own item of edit 0 is the best
    selected = torch.full((3, slots), -1, device=DEVICE)
    selected[0, 0], selected[0, 2], selected[0, -1], selected[1, -2:], selected[2] = 0, 1, 0, 2, 1
    routing = {"token_to_case": torch.tensor([0, 1, 2], device=DEVICE), "selected": selected}
    indices = check(args, {**options, **routing})[3]
    assert (indices == 70).sum() == 1 and indices[0, 0] == 70


def test_few_items_none_and_ties():
    for shared, own, k in ((0, 0, 3), (0, 2, 3), (1, 1, 4), (2, 3, 1)):
        args, options = case_of("given", 2, shared=shared, own=own, k=k)
        cases, selected = torch.tensor([0, 1], device=DEVICE), torch.tensor([[1, 0], [2, -1]], device=DEVICE)
        check(args, options)
        check(args, {**options, "token_to_case": cases, "selected": selected})
    args, options = case_of("given", 1, k=4)
    args[4], args[5][:73], options["sem_norm"] = args[4].round(), 1.0, torch.full((77,), 4.0, device=DEVICE)  # exact
    selected = {"token_to_case": torch.zeros(1, dtype=torch.long, device=DEVICE)}
    selected["selected"] = torch.tensor([[2, 0]], device=DEVICE)
    assert check(args, {**options, **selected})[3].tolist() == [[0, 1, 2, 3]]
    empty, options = case_of("given", 2, shared=0, own=0, spare=0)
    assert (check(empty, options)[3] == -1).all()


def test_what_is_not_finite():
    args, options = case_of("rows", 3)
    args[4][0, 1], args[5][5, 0], args[5][71, 0] = math.nan, math.inf, math.nan
    args[4][2] = 0
    options["sem_norm"] = None
    cases = {"token_to_case": torch.zeros(3, dtype=torch.long, device=DEVICE)}
    cases["selected"] = torch.tensor([[1, 0]], device=DEVICE)
    indices = check(args, {**options, **cases})[3]
    assert (indices[0] == -1).all() and not torch.isin(indices, torch.tensor([5, 71], device=DEVICE)).any()


@pytest.mark.parametrize("form", FORMS)
def test_views_and_three_equal_runs(form):
    args, options = case_of(form, 3, torch.bfloat16)
    first = check(args, options)
    for view in (shifted, strided):
        seen = [view(t) if isinstance(t, torch.Tensor) else t for t in args]
        again = ops.retrieve_and_shift(*seen, **options, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_it_is_the_two_operators():
    args, options = case_of("rows", 4)
    h, used, scores, indices = ops.retrieve_and_shift(*args, **options, backend="triton")
    ranges = options["spans"][1].expand(4, 2)
    found = ops.cosine_topk(args[4], args[5], 5, key_norm=options["sem_norm"], ranges=ranges, backend="triton")
    assert torch.equal(found[0], scores) and torch.equal(found[1], indices)
    rows = {"encoder_rows": options["encoder_rows"], "clamp": False}
    apart = ops.knowledge_shift(*args[:4], indices, **rows, backend="triton")
    assert torch.equal(apart[0], h) and torch.equal(apart[1], used)


def test_what_it_refuses():
    args, options = case_of("given", 65)
    with pytest.raises(ValueError, match="there are 65 tokens, and it takes at most 64"):
        ops.retrieve_and_shift(*args, **options, backend="triton")
    args, options = case_of("given", 2, k=129)
    with pytest.raises(ValueError, match="k is 129 and a case has 0 edits, and it finds at most 128 of each"):
        ops.retrieve_and_shift(*args, **options, backend="triton")
    args, options = case_of("given", 2)
    with pytest.raises(ValueError, match=r"alpha is None, so q must be .* but q is \[2, 6, 16\], out_proj None"):
        ops.retrieve_and_shift(*args, **{**options, "alpha": None})
    with pytest.raises(ValueError, match=r"selected is \[2, 1\], but token_to_case is None"):
        ops.retrieve_and_shift(*args, **options, selected=torch.zeros(2, 1, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match="has no gradients, but h_input, tap want some"):
        args[0].requires_grad_(), args[4].requires_grad_()
        ops.retrieve_and_shift(*args, **options)
    with torch.no_grad():
        ops.retrieve_and_shift(*args, **options)


def test_a_compiler_sees_its_shapes():
    args, options = case_of("rows", 3)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
    on_meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    seen = ops.retrieve_and_shift(*meta, **on_meta, backend="reference")
    real = ops.retrieve_and_shift(*args, **options, backend="reference")
    assert [(t.shape, t.dtype) for t in seen] == [(t.shape, t.dtype) for t in real]
