"""extra_neurons in Triton against the reference: numbers, what is skipped, what is launched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from neuron_inputs import ROUTINGS, make, to64
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference

pytest.importorskip("triton")


def kernel(args, options):
    with poisoned():
        return ops.extra_neurons(**args, **options, backend="triton")


def check(args, options):
    exact = reference.extra_neurons(**to64(args), **options)
    plain = reference.extra_neurons(**args, **options)
    found = kernel(args, options)
    assert_close_to_reference(found, exact, plain, factor=2)
    y = torch.randn_like(plain)
    sums = []
    for function, inputs in (
        (ops.extra_neurons_, args), (reference.extra_neurons_, to64(args)), (reference.extra_neurons_, args)
    ):  # fmt: skip
        into, more = (y.double() if inputs is not args else y.clone()), options
        if function is ops.extra_neurons_:
            more = options | {"backend": "triton"}
        function(into, **inputs, **more)
        sums.append(into)
    assert_close_to_reference(*sums, factor=2)
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_rounding(routing, dtype):
    check(*make(17, routing, dtype=dtype))


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 64, 65, 128])
@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_numbers_of_tokens(tokens, routing):
    args, options = make(tokens, routing, sizes=(3, 17), d=24, d_out=24)
    with launches() as counted:
        check(args, options)
    if tokens and routing == "sc":
        assert set(counted) == {"selected_rows" if tokens <= 64 else "selected_tiles"}
    if tokens == 1:
        assert max(counted.values()) == 2  # one each for the operator and its twin in place


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu", "identity"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(act, gated):
    for routing, tokens in (("", 5), ("sc", 3), ("sc", 66)):
        check(*make(tokens, routing, act=act, gated=gated, zeta=1, d=24, d_out=24, sizes=(3, 2), bias=gated))


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (16,), (33,), (1,) * 2000])
@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_groups_of_any_number_and_size(sizes, routing):
    args, options = make(6, routing.replace("s", "") if not sizes else routing, sizes=sizes, d=24, d_out=24)
    check(args, options)


@pytest.mark.parametrize("routing", ["", "sc", "r"])
def test_no_pointers_are_one_group(routing):
    args, options = make(5, routing, sizes=(19,), zeta=1, spare=0)
    check(args, options | {"group_ptr": None})


@pytest.mark.parametrize("routing", ["", "sc", "rc"])
@pytest.mark.parametrize("move", [shifted, strided])
def test_starts_and_strides(routing, move):
    args, options = make(70, routing, d=24, d_out=24, dtype=torch.float16)
    straight = kernel(args, options)
    moved = {k: move(t) if t is not None and (t.dim() == 2 or move is shifted) else t for k, t in args.items()}
    assert torch.equal(kernel(moved, options), straight)
    columns = {k: t.mT.contiguous().mT if t is not None and t.dim() == 2 else t for k, t in args.items()}
    assert torch.equal(kernel(columns, options), straight)


@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_mixed_dtypes_and_leading_dimensions(routing):
    args, options = make(70, routing, dtype=torch.bfloat16, d=24, d_out=24)
    args |= {"keys": args["keys"].float(), "values": args["values"].to(torch.float16)}
    found = check(args, options)
    leading = kernel(args | {"x": args["x"].view(2, 35, 24)}, options)
    assert torch.equal(leading, found.view(2, 35, 24))


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("routing", ["sc", "rc", "src"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_a_bad_group_stays_with_its_cases(tokens, routing, what):
    args, options = make(tokens, routing, sizes=(3, 4, 20, 2), cases=3, d=24, d_out=24, zeta=0)
    options["token_to_case"] = (torch.arange(tokens) // 2 % 3).to(DEVICE)
    if "s" in routing:
        options["selected"] = torch.tensor([[0, 3], [1, 0], [3, -1]], device=DEVICE)
    if "r" in routing:
        args["route"] = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]], device=DEVICE)
    clean = kernel(args, options)
    for name in ("keys", "values", "up"):
        args[name] = args[name].clone()
        args[name][3:27] = what  # groups 1, of case 1 alone, and 2, of none
    found, of_1 = kernel(args, options), options["token_to_case"] == 1
    assert torch.equal(found[~of_1], clean[~of_1]) and not found[of_1].isfinite().any()


@pytest.mark.parametrize("tokens", [6, 70])
@pytest.mark.parametrize("routing", ["sc", "rc"])
def test_in_place_keeps_every_bit_where_nothing_acts(tokens, routing):
    args, options = make(tokens, routing, sizes=(3, 4), d=24, d_out=24)
    options["token_to_case"] = (torch.arange(tokens) % 2 - 1).to(DEVICE)
    y = torch.randn(tokens, 24).to(DEVICE)
    y[::2, 0], y[::2, 1] = float("nan"), -0.0
    before = y.clone()
    ops.extra_neurons_(y, **args, **options, backend="triton")
    assert torch.equal(y[::2].view(torch.int32), before[::2].view(torch.int32))


@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_repetitions_and_runs(routing):
    args, options = make(66, routing, d=24, d_out=24)
    first = kernel(args, options)
    if "s" in routing:
        twice = options | {"selected": torch.cat([options["selected"]] * 2, 1)}
        assert torch.equal(kernel(args, twice), first)
    assert all(torch.equal(kernel(args, options), first) for _ in range(2))


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 18), min_size=1, max_size=4),
    routing=st.sampled_from(ROUTINGS),
    tokens=st.integers(1, 70),
    gated=st.booleans(),
    zeta=st.integers(0, 2),
)
def test_any_groups_and_routing(sizes, routing, tokens, gated, zeta):
    check(*make(tokens, routing, sizes=tuple(sizes), gated=gated, zeta=zeta, d=20, d_out=12))


@pytest.mark.parametrize("routing", ["", "sc"])
def test_in_place_of_its_own_input(routing):
    """y and x in one storage: what is added is computed from x as it was."""
    args, options = make(9, routing, d=24, d_out=24)
    y, wanted = args["x"].clone(), args["x"] + reference.extra_neurons(**args, **options)
    ops.extra_neurons_(y, **{**args, "x": y}, **options, backend="triton")
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
