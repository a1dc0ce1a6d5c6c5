"""What holds of the Triton operators whatever the numbers are: order, linearity, equal runs, tiles, autocast."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, DTYPES, poisoned
from operator_cases import (
    FORMS,
    NEURONS,
    PARTS,
    check,
    check_gradients,
    close,
    ffn,
    gradients,
    ints,
    neurons,
    pointers,
    rand,
    run,
    shift,
    tokens_of,
)

from unike_kernels import ops, reference
from unike_kernels.triton_kernels import tuning

few = settings(max_examples=4)
seeds = st.integers(0, 10_000)
group_sizes = st.lists(st.integers(0, 18), min_size=1, max_size=4)


# ---------------------------------------------------------------------------------------------------- extra_neurons


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
