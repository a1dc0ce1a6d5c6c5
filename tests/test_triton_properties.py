"""What holds of the Triton operators whatever the numbers are; tiles, sizes and chunks that other tests do not take."""

import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, DTYPES, launches, poisoned
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference
from unike_kernels.triton_kernels import tuning

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
FORMS = ["always", "route", "selected", "cases"]
few = settings(max_examples=4)
seeds = st.integers(0, 10_000)
group_sizes = st.lists(st.integers(0, 18), min_size=1, max_size=4)


def rand(*shape, dtype=torch.float32, fan=1):
    return (torch.randn(shape) / max(1, fan) ** 0.5).to(DEVICE, dtype)


def ints(values):
    return torch.as_tensor(values, dtype=torch.int64, device=DEVICE)


def pointers(sizes):
    return ints([0, *sizes]).cumsum(0)


def run(name, arguments, backend="triton"):
    """The operator on poisoned memory; always a tuple."""
    with poisoned():
        result = getattr(ops, name)(**arguments, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def cast(value, dtype):
    if isinstance(value, (list, tuple)):
        return type(value)(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(name, arguments):
    """The kernels are as exact as rounding allows."""
    exact = getattr(reference, name)(**{k: cast(v, torch.float64) for k, v in arguments.items()})
    same = getattr(reference, name)(**arguments)
    with launches() as counted:
        found = run(name, arguments)
    assert counted
    for f, e, s in zip(found, *(r if isinstance(r, tuple) else (r,) for r in (exact, same)), strict=True):
        assert_close_to_reference(f, e, s, 2)
    return found


def gradients(name, arguments, wanted, grad, backend):
    leaves = {key: arguments[key].detach().clone().requires_grad_() for key in wanted}
    operator = getattr(reference, name) if backend is None else partial(getattr(ops, name), backend=backend)
    out = operator(**{**arguments, **leaves})
    out = out[0] if isinstance(out, tuple) else out
    return torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True)


def check_gradients(name, arguments, wanted):
    grad = rand(*(arguments["x"] if "x" in arguments else arguments["h_input"]).shape)
    wide = {k: cast(v, torch.float64) for k, v in arguments.items()}
    with poisoned():
        found = gradients(name, arguments, wanted, grad, "triton")
    exact, same = gradients(name, wide, wanted, grad, None), gradients(name, arguments, wanted, grad, None)
    for key, f, e, s in zip(wanted, found, exact, same, strict=True):
        try:
            assert_close_to_reference(f, e, s, 3)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None


# ---------------------------------------------------------------------------------------------------- extra_neurons


def neurons(sizes, tokens=5, form="selected", *, d=20, dtype=torch.float32, gated=True):
    """Arguments of extra_neurons; `cases` with more than 64 tokens takes the kernel of tiles."""
    n, groups = sum(sizes), len(sizes)
    r = partial(rand, dtype=dtype)
    arguments = {"x": r(tokens, d), "keys": r(n, d, fan=d), "key_bias": r(n), "values": r(n, d, fan=n), "act": "silu"}
    arguments |= {"zeta": r(groups, d, fan=n), "beta": 0.5, "group_ptr": pointers(sizes)}
    if gated:
        arguments |= {"up": r(n, d, fan=d), "up_bias": r(n)}
    rows = 3 if form == "cases" else tokens
    if form == "route":
        arguments["route"] = (rand(rows, groups) * torch.randint(0, 2, (rows, groups)).to(DEVICE)).to(dtype)
    elif form != "always":
        arguments["selected"] = torch.randint(-1, groups, (rows, 2)).to(DEVICE)
    if form == "cases":
        arguments["token_to_case"] = torch.randint(-1, rows, (tokens,)).to(DEVICE)
    return arguments


def taking(arguments, order):
    """The same with only the groups of `order`, in that order."""
    ptr = arguments["group_ptr"].tolist()
    rows = ints([i for g in order for i in range(ptr[g], ptr[g + 1])])
    taken = dict(arguments, group_ptr=pointers([ptr[g + 1] - ptr[g] for g in order]), zeta=arguments["zeta"][order])
    for name in ("keys", "key_bias", "values", "up", "up_bias"):
        if name in arguments:
            taken[name] = arguments[name][rows]
    if "route" in arguments:
        taken["route"] = arguments["route"][:, order]
    if "selected" in arguments:
        place = ints([order.index(g) if g in order else -1 for g in range(len(ptr) - 1)] + [-1])
        taken["selected"] = place[arguments["selected"]]
    return taken


def tokens_of(form):
    """More for a route: each of its gradients is a sum that cancels, and a few say nothing of the usual error."""
    return {"cases": 66, "route": 20}.get(form, 5)


@pytest.mark.parametrize("form", FORMS)
@few
@given(seed=seeds, sizes=group_sizes)
def test_groups_add_up_in_any_order(form, seed, sizes):
    torch.manual_seed(seed)
    arguments = neurons(sizes, tokens_of(form), form)
    (y,) = run("extra_neurons", arguments)
    apart = [run("extra_neurons", taking(arguments, [g]))[0] for g in range(len(sizes))]
    close(y, torch.stack(apart).sum(0))
    order = torch.randperm(len(sizes)).tolist()
    close(run("extra_neurons", taking(arguments, order))[0], y)


@pytest.mark.parametrize("form", FORMS)
@few
@given(seed=seeds, sizes=group_sizes, factor=st.floats(-2, 2))
def test_linear_in_the_values(form, seed, sizes, factor):
    torch.manual_seed(seed)
    arguments = neurons(sizes, tokens_of(form), form)
    other = {name: torch.randn_like(arguments[name]) for name in ("values", "zeta")}
    both = {name: arguments[name] + factor * other[name] for name in other}
    y, more, total = (run("extra_neurons", {**arguments, **changed})[0] for changed in ({}, other, both))
    close(total, y + factor * more, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_selected_is_zero_and_in_place_keeps_every_bit(form, dtype):
    arguments = neurons([7, 0, 5], tokens_of(form), form, dtype=dtype)
    for name in ("keys", "key_bias", "values", "up", "up_bias", "zeta"):
        arguments[name].fill_(math.nan)
    if form == "route":
        arguments["route"].zero_()
    else:
        arguments["selected"].fill_(-1)
    assert run("extra_neurons", arguments)[0].eq(0).all()
    y = rand(*arguments["x"].shape, dtype=dtype)
    y[0, 0], y[1, 0] = -0.0, math.inf
    before = y.clone().view(torch.int32 if dtype == torch.float32 else torch.int16)
    run("extra_neurons_", {"y": y, **arguments})
    assert torch.equal(y.view(before.dtype), before)


@pytest.mark.parametrize("form", FORMS[1:])
def test_groups_that_are_not_selected_do_not_leak(form):
    arguments = neurons([7, 20, 5], tokens_of(form), form)
    if form == "route":
        arguments["route"][:, 1] = 0
    else:
        arguments["selected"][arguments["selected"] == 1] = 2
    dirty = dict(arguments)
    for name in ("keys", "key_bias", "values", "up", "up_bias"):
        dirty[name] = arguments[name].clone()
        dirty[name][7:27] = math.nan
    dirty["zeta"] = arguments["zeta"].clone()
    dirty["zeta"][1] = math.nan
    assert torch.equal(run("extra_neurons", dirty)[0], run("extra_neurons", arguments)[0])
    names = [name for name in ("x", "keys", "key_bias", "values", "up", "up_bias", "zeta", "route") if name in dirty]
    grad = torch.randn_like(arguments["x"])
    with poisoned():
        clean, found = (gradients("extra_neurons", a, names, grad, "triton") for a in (arguments, dirty))
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))


# ---------------------------------------------------------------------------------------------------- augmented_ffn


def ffn(tokens=5, n=21, *, d=24, width=40, dtype=torch.float32, gated=True):
    r = partial(rand, dtype=dtype)
    arguments = {"x": r(tokens, d), "w_k": r(width, d, fan=d), "b_k": r(width), "w_v": r(d, width, fan=width)}
    arguments |= {"b_v": r(d), "keys": r(n, d, fan=d), "key_bias": r(n), "values": r(n, d, fan=n), "act": "gelu"}
    arguments |= {"zeta": r(d, fan=n), "beta": 0.5}
    if gated:
        arguments |= {"w_up": r(width, d, fan=d), "b_up": r(width), "up": r(n, d, fan=d), "up_bias": r(n)}
    return arguments


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@few
@given(seed=seeds, tokens=st.sampled_from([1, 17, 70]), n=st.integers(0, 40), beta=st.sampled_from([0.0, 0.7]))
def test_an_ffn_whose_weights_were_concatenated(gated, seed, tokens, n, beta):
    torch.manual_seed(seed)
    a = {**ffn(tokens, n, gated=gated), "beta": beta}
    (y,) = run("augmented_ffn", a)
    values = a["values"] + beta * a["zeta"]
    w_k, b_k = torch.cat([a["w_k"], a["keys"]]), torch.cat([a["b_k"], a["key_bias"]])
    w_v = torch.cat([a["w_v"], values.T], 1)
    gate = (torch.cat([a["w_up"], a["up"]]), torch.cat([a["b_up"], a["up_bias"]])) if gated else (None, None)
    close(y, reference.ffn(a["x"], w_k, b_k, w_v, a["b_v"], act="gelu", w_up=gate[0], b_up=gate[1]))
    # beta 0: equation 3, whatever zeta is.
    without = {**a, "zeta": torch.full_like(a["zeta"], math.nan), "beta": 0.0}
    assert torch.equal(run("augmented_ffn", without)[0], run("augmented_ffn", {**a, "zeta": None})[0])


# -------------------------------------------------------------------------------------------------- knowledge_shift


def shift(tokens=5, *, heads=4, kv_heads=2, hd=8, items=9, k=4, d=None, dtype=torch.float32, cases=None, raw=False):
    r = partial(rand, dtype=dtype)
    width = d or heads * hd
    if raw:
        arguments = {"h_input": r(tokens, width), "q": r(tokens, width), "item_keys": r(items, width)}
        arguments["item_values"] = r(items, width)
    else:
        arguments = {"h_input": r(tokens, width), "q": r(tokens, heads, hd), "item_keys": r(items, kv_heads, hd)}
        arguments["item_values"] = r(items, kv_heads, hd)
        if d:
            arguments["out_proj"] = (r(d, heads * hd, fan=heads * hd), r(d))
    # What is known and the input have something in common: the relative error of a cosine near 0 is chance.
    common = r(width)
    arguments["h_input"] += common
    if raw:
        arguments["item_keys"] += common
        arguments["item_values"] += common
    elif d:
        arguments["out_proj"] = (arguments["out_proj"][0], arguments["out_proj"][1] + common)
    rows = cases or tokens
    arguments["indices"] = torch.stack([torch.randperm(items)[:k] for _ in range(rows)]).to(DEVICE)
    if cases:
        arguments["token_to_case"] = torch.randint(-1, cases, (tokens,)).to(DEVICE)
    return arguments


some_shifts = st.sampled_from(
    [
        {"raw": True, "d": 24},
        {"raw": True, "d": 24, "tokens": 67, "cases": 3},
        {"d": 24},
        {"cases": 2},
        {"tokens": 66, "cases": 3, "d": 24},
    ]
)


@settings(max_examples=5)
@given(seed=seeds, shape=some_shifts, given_alpha=st.booleans())
def test_order_of_items_and_of_the_memory(seed, shape, given_alpha):
    torch.manual_seed(seed)
    arguments = shift(**shape) | ({"alpha": 0.4} if given_alpha else {})
    arguments["indices"][0, 1:3] = -1
    expected = run("knowledge_shift", arguments)
    shuffled = torch.stack([row[torch.randperm(len(row))] for row in arguments["indices"].cpu()]).to(DEVICE)
    for found, wanted in zip(run("knowledge_shift", {**arguments, "indices": shuffled}), expected, strict=True):
        close(found, wanted)
    order = torch.randperm(9).to(DEVICE)
    place = torch.cat([order.argsort(), ints([-1])])
    moved = {name: arguments[name][order] for name in ("item_keys", "item_values")}
    found = run("knowledge_shift", {**arguments, **moved, "indices": place[arguments["indices"]]})
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))  # the same rows in the same places


@settings(max_examples=4)
@given(seed=seeds, shape=some_shifts, weight=st.floats(0.125, 0.875, width=16))
def test_orientations_mirror_each_other(seed, shape, weight):
    torch.manual_seed(seed)
    arguments = shift(**shape)
    count = len(arguments["indices"])
    alpha = torch.full((count,), weight, device=DEVICE)
    (h, _), (mirrored, _) = (
        run("knowledge_shift", {**arguments, "alpha": a, "orientation": o})
        for a, o in ((alpha, "knowledge"), (1 - alpha, "input"))
    )
    close(h, mirrored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=2)
@given(seed=seeds, shape=some_shifts)
def test_left_alone_to_the_bit(dtype, seed, shape):
    torch.manual_seed(seed)
    arguments = shift(**shape, dtype=dtype)
    h = arguments["h_input"]
    h[0, 0] = -0.0
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    nothing = {**arguments, "indices": torch.full_like(arguments["indices"], -1)}
    left = [nothing, {**nothing, "alpha": 0.5}, {**arguments, "alpha": 0.0}]
    left.append({**arguments, "alpha": 1.0, "orientation": "input"})
    if "token_to_case" in arguments:
        left.append({**arguments, "token_to_case": torch.full_like(arguments["token_to_case"], -1)})
    for kept in left:
        assert torch.equal(run("knowledge_shift", kept)[0].view(bits), h.view(bits))


@settings(max_examples=3)
@given(seed=seeds, shape=some_shifts)
def test_tokens_in_parts(seed, shape):
    torch.manual_seed(seed)
    arguments = shift(**shape)
    expected = run("knowledge_shift", arguments)
    tokens = len(arguments["h_input"])
    per_token = ["h_input", "q", "token_to_case"] if "token_to_case" in arguments else ["h_input", "q", "indices"]
    parts = []
    for part in (slice(0, 2), slice(2, tokens)):
        parts.append(run("knowledge_shift", {**arguments, **{n: arguments[n][part] for n in per_token}}))
    for whole, *pieces in zip(expected, *parts, strict=True):
        close(torch.cat(pieces), whole)


# ------------------------------------------------------------------------------------- equal runs, tiles, autocast

NEURONS = ["x", "keys", "key_bias", "values", "up", "up_bias", "zeta"]
PARTS = ["h_input", "q", "item_keys", "item_values"]


def operations(dtype=torch.bfloat16):
    """name -> (operator, arguments, leaves): every kernel of the package runs in one of them."""
    found = {
        f"neurons {form}": ("extra_neurons", neurons([9, 0, 20], tokens_of(form), form, dtype=dtype), NEURONS)
        for form in FORMS
    }
    found["neurons route"] = (*found["neurons route"][:2], [*NEURONS, "route"])
    leaves = [*NEURONS, "w_k", "b_k", "w_v", "b_v", "w_up", "b_up"]
    found |= {f"ffn {t}": ("augmented_ffn", ffn(t, dtype=dtype), leaves) for t in (3, 20, 66)}
    found["shift"] = ("knowledge_shift", {**shift(4, dtype=dtype), "alpha": torch.rand(4, device=DEVICE)}, PARTS)
    encoded = shift(5, d=40, dtype=dtype)
    encoded |= {"encoder": [(rand(40, 40, dtype=dtype, fan=40), rand(40, dtype=dtype))], "clamp": False}
    found["shift encoded"] = ("knowledge_shift", encoded, PARTS)
    cases = shift(66, heads=2, kv_heads=1, cases=3, dtype=dtype) | {"alpha": torch.rand(3, device=DEVICE)}
    found["shift cases"] = ("knowledge_shift", cases, [*PARTS, "alpha"])
    found["shift raw"] = ("knowledge_shift", shift(4, raw=True, d=40, dtype=dtype), PARTS)
    top = {"q": rand(3, 20, dtype=dtype), "keys": rand(90, 20, dtype=dtype), "k": 5}
    found["topk"] = ("cosine_topk", top, [])
    return found


NAMES = list(operations())


@pytest.mark.parametrize("case", NAMES)
def test_three_runs_are_equal(case):
    name, arguments, leaves = operations()[case]
    grad = rand(*(arguments.get("x", arguments.get("h_input", arguments.get("q")))).shape)
    runs = []
    for _ in range(3):
        results = list(run(name, arguments))
        if leaves:
            with poisoned():
                results += gradients(name, arguments, leaves, grad, "triton")
        runs.append(results)
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(again, runs[0], strict=True))


def table(scale):
    """A tuning file: every block of the interpreter's rows `scale` times as large, but at least 16."""
    rows = {}
    for row in tuning.ROWS:
        if row.arch in (0, tuning.INTERPRETER) and row.kernel not in rows:
            keep = ("num_warps", "num_stages", "programs")
            blocks = {k: v if k in keep else max(16, int(v * scale)) for k, v in row.choice.items()}
            rows[row.kernel] = tuning.Row(row.kernel, 0, {}, {**blocks, "num_stages": 1})._asdict()
    return list(rows.values())


@pytest.mark.parametrize("tiles", ["half", "double", "sm_90"])
@pytest.mark.parametrize("case", NAMES)
def test_other_tiles(case, tiles, tmp_path, monkeypatch):
    name, arguments, leaves = operations(torch.float32 if tiles == "half" else torch.bfloat16)[case]
    run(name, arguments)  # its rows are in the table from here on
    if leaves:
        gradients(name, arguments, leaves[:1], arguments[leaves[0]], "triton")
    before = tuning.architecture(DEVICE)
    if tiles != "sm_90":
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps(table(0.5 if tiles == "half" else 2)))
        monkeypatch.setenv("UNIKE_TUNING", str(path))
    with tuning.pretend(90 if tiles == "sm_90" else before):
        if name == "cosine_topk":
            scores, indices = run(name, arguments)
            exact, wanted = reference.cosine_topk(arguments["q"].double(), arguments["keys"].double(), 5)
            close(scores.double(), exact)
            assert torch.equal(indices, wanted)
            return
        check(name, arguments)
        check_gradients(name, arguments, leaves)


@pytest.mark.parametrize("case", ["neurons always", "neurons selected", "ffn 20", "ffn 66", "shift encoded", "topk"])
def test_autocast_changes_nothing(case):
    name, arguments, leaves = operations(torch.float32)[case]
    grad = rand(*(arguments.get("x", arguments.get("h_input", arguments.get("q")))).shape)

    def results():
        return [*run(name, arguments), *(gradients(name, arguments, leaves, grad, "triton") if leaves else [])]

    plain = results()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(results(), plain, strict=True))


@pytest.mark.parametrize("case", ["neurons selected", "ffn 3", "shift"])
def test_a_second_backward_is_refused(case):
    name, arguments, leaves = operations(torch.float32)[case]
    leaf = arguments[leaves[0]].requires_grad_()
    out = getattr(ops, name)(**arguments, backend="triton")
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["extra_neurons", "extra_neurons_", "augmented_ffn", "knowledge_shift", "cosine_topk"])
def test_opcheck(name, monkeypatch):
    """Schema, fake kernel, gradient and compilation of the operator, with the arguments that reach it."""
    calls = []
    operator = getattr(torch.ops.unike, name)
    cases = {"extra_neurons": "neurons selected", "augmented_ffn": "ffn 3", "knowledge_shift": "shift encoded"}
    _, arguments, leaves = operations(torch.float32)[cases.get(name.rstrip("_"), "topk")]
    if name == "extra_neurons_":
        arguments = {"y": rand(*arguments["x"].shape), **arguments}
    else:
        arguments |= {leaf: arguments[leaf].requires_grad_() for leaf in leaves}

    class Recorded:
        def __getattr__(self, _):
            return lambda *args: calls.append(args) or operator(*args)

    monkeypatch.setattr(torch.ops, "unike", Recorded())
    getattr(ops, name)(**arguments, backend="triton")
    monkeypatch.undo()
    torch.library.opcheck(operator.default, calls[0])


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("hd", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_28_query_heads_on_4(hd, dtype):
    arguments = shift(2, heads=28, kv_heads=4, hd=hd, dtype=dtype)
    check("knowledge_shift", {**arguments, "alpha": torch.rand(2, device=DEVICE)})
    if hd == 80:
        check_gradients("knowledge_shift", {**arguments, "alpha": 0.5}, PARTS)
        many = shift(65, heads=28, kv_heads=4, hd=hd, cases=2, k=2, dtype=dtype)
        check("knowledge_shift", {**many, "alpha": 0.5})


@pytest.mark.parametrize("d", [80, 112, 200, 37, 100])
def test_hidden_sizes(d):
    dtype = torch.bfloat16
    for form in ("always", "selected"):
        check("extra_neurons", neurons([3, 18], 3, form, d=d, dtype=dtype))
    check("augmented_ffn", ffn(3, d=d, width=d + 9, dtype=dtype))
    raw = shift(3, raw=True, d=d, dtype=dtype)
    check("knowledge_shift", raw)
    check("knowledge_shift", shift(3, d=d, dtype=dtype))
    if d in (37, 112):
        check_gradients("extra_neurons", neurons([3, 18], 3, d=d, dtype=dtype), NEURONS)
        check_gradients("knowledge_shift", raw, PARTS)


def test_one_group_of_many_resident_neurons():
    """200,000 are in memory, ten of them are read: NaN everywhere else."""
    n, d = 200_000, 16
    arguments = {"x": rand(2, d, dtype=torch.float16), "act": "gelu", "group_ptr": ints([0, 150_000, n - 10, n])}
    shapes = {"keys": (n, d), "key_bias": (n,), "values": (n, d)}
    for name, shape in shapes.items():
        arguments[name] = torch.full(shape, math.nan, dtype=torch.float16, device=DEVICE)
        arguments[name][-10:] = rand(10, *shape[1:], dtype=torch.float16, fan=4)
    (y,) = run("extra_neurons", {**arguments, "selected": ints([[2], [-1]])})
    last = {name: arguments[name][-10:] for name in shapes}
    expected = reference.extra_neurons(arguments["x"].double(), **cast_all(last), act="gelu")
    same = reference.extra_neurons(arguments["x"], **last, act="gelu")
    assert_close_to_reference(y[:1], expected[:1], same[:1], 2)
    assert y[1].eq(0).all()


def cast_all(tensors):
    return {name: t.double() for name, t in tensors.items()}


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """Rows 2**31 elements into one buffer. Not for the interpreter, which would commit all of its 4.3 GB."""
    n, d, gap = 200_000, 16, 10_800
    buffer = torch.empty(n * gap, dtype=torch.float16, device=DEVICE)
    keys, values = (buffer.as_strided((n, d), (gap, 1), offset) for offset in (0, d))
    for rows in (keys, values):
        rows[-10:] = rand(10, d, dtype=torch.float16, fan=4)
    x, ptr = rand(2, d, dtype=torch.float16), ints([0, n - 10, n])
    for selected, more in ((ints([[1], [1]]), {}), (None, {"route": ints([[0, 1], [0, 1]]).half()})):
        y = ops.extra_neurons(
            x, keys, None, values, act="gelu", group_ptr=ptr, selected=selected, backend="triton", **more
        )
        close(
            y.float(),
            reference.extra_neurons(x, keys[-10:], None, values[-10:], act="gelu").float(),
            rtol=1e-2,
            atol=1e-2,
        )


@pytest.mark.gpu
def test_item_heads_that_lie_beyond_32_bits():
    """Heads as the outer dimension of a memory: the third one starts 2**31 elements behind the first."""
    heads, items, hd = 3, 9, 16
    buffer = torch.empty(2**31 + items * hd, dtype=torch.float16, device=DEVICE)
    view = buffer.as_strided((items, heads, hd), (hd, 2**30, 1))
    near = rand(items, heads, hd, dtype=torch.float16)
    view.copy_(near)
    arguments = {**shift(3, heads=3, kv_heads=3, hd=hd, dtype=torch.float16), "alpha": torch.rand(3, device=DEVICE)}
    far, wanted = (run("knowledge_shift", {**arguments, "item_keys": m, "item_values": m}) for m in (view, near))
    assert all(torch.equal(a, b) for a, b in zip(far, wanted, strict=True))


@pytest.mark.gpu
def test_query_heads_that_lie_beyond_32_bits():
    """Heads as the outer dimension of the tokens: the third one starts 2**31 elements behind the first."""
    tokens, heads, hd = 5, 3, 16
    buffer = torch.empty(2**31 + tokens * hd, dtype=torch.float16, device=DEVICE)
    arguments = {**shift(tokens, heads=heads, kv_heads=1, hd=hd, dtype=torch.float16)}
    arguments["alpha"] = torch.rand(tokens, device=DEVICE)
    view = buffer.as_strided((tokens, heads, hd), (hd, 2**30, 1)).copy_(arguments["q"])
    far, wanted = (run("knowledge_shift", {**arguments, "q": q}) for q in (view, arguments["q"]))
    assert all(torch.equal(a, b) for a, b in zip(far, wanted, strict=True))
    found = []
    for q in (view, arguments["q"]):
        parts = {**arguments, "item_keys": arguments["item_keys"].clone().requires_grad_(), "q": q}
        run("knowledge_shift", parts)[0].sum().backward()
        found.append(parts["item_keys"].grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["always", "selected"])
def test_thousands_of_groups_most_of_them_empty(form):
    sizes = [3 if g % 100 == 50 else 0 for g in range(2500)]
    arguments = neurons(sizes, 3, form, d=16)
    if form == "selected":
        arguments["selected"] = ints([[50, 51, 2499], [2450, -1, 50], [0, -1, -1]])
    (y,) = check("extra_neurons", arguments)
    assert (form == "always") == bool(y[2].any())
    check_gradients("extra_neurons", arguments, ["x", "keys", "values"])


# ----------------------------------------------------------------------------------------------------------- chunks


def test_activations_in_chunks_of_tokens(monkeypatch):
    arguments = neurons([9, 20], 260, "always")
    whole = run("extra_neurons", arguments)[0]
    monkeypatch.setattr("unike_kernels.triton_kernels.extra_neurons.WORKSPACE", 1)
    with launches() as counted:
        parts = check("extra_neurons", arguments)[0]
        check("extra_neurons", {**arguments, "route": rand(260, 2)})
        cases = {"route": rand(3, 2), "token_to_case": torch.randint(-1, 3, (260,)).to(DEVICE)}
        check("extra_neurons", {**arguments, **cases})
        y = rand(260, 20)
        close(ops.extra_neurons_(y.clone(), **arguments, backend="triton"), y + whole)
    assert counted["hidden"] == counted["weighted_rows"] == 12
    assert torch.equal(parts, whole)
    with launches() as counted:
        check("augmented_ffn", ffn(130, 9))
    assert counted["hidden"] == 2


@pytest.mark.parametrize("form", ["always", "route", "selected"])
def test_gradients_in_chunks_of_neurons(form, monkeypatch):
    """Groups lie across the border of two chunks; sums over neurons go on from one to the next."""
    arguments = neurons([100, 0, 100, 60], 4, form)
    wanted = [*NEURONS, *(["route"] if form == "route" else [])]
    monkeypatch.setattr("unike_kernels.triton_kernels.extra_neurons_backward.WORKSPACE", 1)
    with launches() as counted:
        check_gradients("extra_neurons", arguments, wanted)
    assert counted["hidden_grads"] == 3
