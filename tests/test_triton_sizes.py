"""Sizes of the Triton operators that other tests do not take: of heads and rows, beyond 32 bits, and in chunks."""

import math

import pytest
import torch
from kernel_tools import DEVICE, launches
from operator_cases import (
    NEURONS,
    PARTS,
    check,
    check_gradients,
    close,
    ffn,
    ints,
    neurons,
    rand,
    run,
    shift,
)
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference

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
