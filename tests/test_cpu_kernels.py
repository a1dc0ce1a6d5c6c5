"""The native code of extra_neurons and knowledge_shift on the CPU against the reference, at both instruction levels."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DTYPES, poisoned, shifted, strided
from neuron_inputs import ROUTINGS, make, to64
from shift_bodies import SHAPES, ids, inputs, layer, on_cases, wide
from tolerance import assert_close_to_reference
from torch.utils._python_dispatch import TorchDispatchMode

from unike_kernels import backends, cpu_kernels, native, ops, reference

if native.cpu() is None:
    pytest.skip(f"no CPU module: {native.no_cpu()}", allow_module_level=True)


@pytest.fixture(autouse=True, params=["machine", "portable"])
def level(request, monkeypatch):
    """What the machine has, and plain C++."""
    monkeypatch.setattr(cpu_kernels, "PORTABLE", request.param == "portable")


def here(value):
    """The same on the CPU: on a machine with a GPU the shared inputs lie there."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: here(inner) for name, inner in value.items()}
    return type(value)(here(inner) for inner in value) if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------------- extra_neurons


def neurons(args, options):
    with poisoned(cpu_kernels):
        return ops.extra_neurons(**args, **options, backend="cpu")


def check_neurons(args, options):
    args, options = here(args), here(options)
    exact = reference.extra_neurons(**to64(args), **options)
    plain = reference.extra_neurons(**args, **options)
    found = neurons(args, options)
    assert_close_to_reference(found, exact, plain, factor=2)
    y = torch.randn_like(plain)
    into = [y.clone(), y.double(), y.clone()]
    ops.extra_neurons_(into[0], **args, **options, backend="cpu")
    reference.extra_neurons_(into[1], **to64(args), **options)
    reference.extra_neurons_(into[2], **args, **options)
    assert_close_to_reference(*into, factor=2)
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_rounding(routing, dtype):
    for tokens in (1, 7):
        check_neurons(*make(tokens, routing, dtype=dtype))


@pytest.mark.parametrize("act", cpu_kernels.ACTS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(act, gated):
    for routing, tokens in (("", 5), ("sc", 3), ("rc", 40)):
        check_neurons(*make(tokens, routing, act=act, gated=gated, zeta=1, bias=gated))


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (33,), (1,) * 300])
@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_groups_of_any_number_and_size(sizes, routing):
    check_neurons(*make(6, routing.replace("s", "") if not sizes else routing, sizes=sizes, d=24, d_out=24))
    args, options = make(5, routing.replace("s", ""), sizes=(19,), zeta=1, spare=0)
    check_neurons(args, options | {"group_ptr": None})


@pytest.mark.parametrize("routing", ["", "sc", "rc"])
def test_views_mixed_dtypes_and_leading_dimensions(routing):
    args, options = here(make(12, routing, dtype=torch.bfloat16, d=24, d_out=24))
    straight = check_neurons(args, options)
    for move in (shifted, strided):
        moved = {k: move(t) if t is not None and (t.dim() == 2 or move is shifted) else t for k, t in args.items()}
        assert torch.equal(neurons(moved, options), straight)
        y, into = torch.randn(12, 24).bfloat16(), move(torch.zeros(12, 24, dtype=torch.bfloat16))
        into.copy_(y)
        ops.extra_neurons_(into, **moved, **options, backend="cpu")
        assert torch.equal(into, ops.extra_neurons_(y, **args, **options, backend="cpu"))
    columns = {k: t.mT.contiguous().mT if t is not None and t.dim() == 2 else t for k, t in args.items()}
    assert torch.equal(neurons(columns, options), straight)
    assert torch.equal(neurons(args | {"x": args["x"].view(3, 4, 24)}, options), straight.view(3, 4, 24))
    check_neurons(args | {"keys": args["keys"].float(), "values": args["values"].half()}, options)


@pytest.mark.parametrize("routing", ["sc", "rc", "src"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_bad_group_stays_with_its_cases(routing, what):
    args, options = here(make(6, routing, sizes=(3, 4, 20, 2), cases=3, d=24, d_out=24, zeta=0))
    options["token_to_case"] = torch.arange(6) // 2 % 3
    if "s" in routing:
        options["selected"] = torch.tensor([[0, 3], [1, 0], [3, -1]])
    if "r" in routing:
        args["route"] = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    clean = neurons(args, options)
    for name in ("keys", "values", "up"):
        args[name] = args[name].clone()
        args[name][3:27] = what  # groups 1, of case 1 alone, and 2, of none
    found, of_1 = neurons(args, options), options["token_to_case"] == 1
    assert torch.equal(found[~of_1], clean[~of_1]) and not found[of_1].isfinite().any()


@pytest.mark.parametrize("routing", ["sc", "rc"])
def test_in_place_keeps_every_bit_where_nothing_acts(routing):
    args, options = here(make(6, routing, sizes=(3, 4), d=24, d_out=24))
    options["token_to_case"] = torch.arange(6) % 2 - 1
    y = torch.randn(6, 24)
    y[::2, 0], y[::2, 1] = math.nan, -0.0
    before = y.clone()
    ops.extra_neurons_(y, **args, **options, backend="cpu")
    assert torch.equal(y[::2].view(torch.int32), before[::2].view(torch.int32)) and not torch.equal(y, before)
    twice = options | {"selected": torch.cat([options["selected"]] * 2, 1)} if "s" in routing else options
    assert torch.equal(neurons(args, twice), neurons(args, options))


def test_ids_out_of_range_are_index_errors_and_change_nothing():
    args, options = here(make(4, "sc"))
    y = torch.randn(4, 56)
    before = y.clone()
    for name, wrong in (("selected", 5), ("token_to_case", 3), ("group_ptr", 99)):
        bad = options | {name: options[name].clone()}
        bad[name].view(-1)[-1] = wrong
        if name == "group_ptr":
            bad["selected"] = torch.full((3, 1), 4)
        with pytest.raises(IndexError, match=name):
            ops.extra_neurons_(y, **args, **bad, backend="cpu")
    with pytest.raises(IndexError, match="group_ptr"):
        ops.extra_neurons_(y, **args, act="silu", group_ptr=torch.tensor([0, 3, 2, 9, 9, 9]), backend="cpu")
    assert torch.equal(y, before)
    h, q, keys, values = here(inputs(3))
    for row in (
        {"indices": torch.tensor([[1, 9]] * 3)},
        {"indices": ids(2, 3), "token_to_case": torch.tensor([0, 2, 1])},
    ):
        with pytest.raises(IndexError):
            ops.knowledge_shift(h, q, keys, values, **here(row), alpha=0.5, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_and_every_float_rounded_as_torch_does(dtype):
    one = torch.ones(1, 1)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    found = ops.extra_neurons(one, one, None, every, act="identity", backend="cpu")
    torch.testing.assert_close(found, every.float(), rtol=0, atol=0, equal_nan=True)
    floats = torch.randint(-(2**31), 2**31, (1, 2**18)).to(torch.int32).view(torch.float32)
    halfway = (every.float() + every.float().roll(-1)) / 2
    for values in (floats, every.float(), halfway, every.float() * (1 + 2**-20), torch.rand(1, 2**16) * 2.0**-14):
        found = ops.extra_neurons(one.to(dtype), one, None, values, act="identity", backend="cpu")
        torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 18), min_size=1, max_size=4),
    routing=st.sampled_from(ROUTINGS),
    tokens=st.integers(0, 20),
    gated=st.booleans(),
    zeta=st.integers(0, 2),
    d=st.integers(1, 70),
    d_out=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_any_groups_and_routing(sizes, routing, tokens, gated, zeta, d, d_out, dtype):
    check_neurons(
        *make(tokens, routing, sizes=tuple(sizes), gated=gated, zeta=zeta, d=d, d_out=d_out, dtype=dtype)
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- knowledge_shift


def check_shift(parts, indices, **options):
    parts, indices, options = here(parts), here(indices), here(options)
    with poisoned(cpu_kernels):
        h, used = ops.knowledge_shift(*parts, indices, backend="cpu", **options)
    exact = reference.knowledge_shift(*wide(parts), indices, **{name: wide(value) for name, value in options.items()})
    same = reference.knowledge_shift(*parts, indices, **options)
    assert_close_to_reference(h, exact[0], same[0], 2)
    assert_close_to_reference(used, exact[1], same[1], 2)
    kept = (same[0] == parts[0]).all(-1)
    assert torch.equal(h[kept], parts[0][kept])
    return h, used


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_alpha(shape, dtype):
    parts = inputs(3, **SHAPES[shape], dtype=dtype)
    indices = ids(3, 5)
    check_shift(parts, indices, alpha=torch.tensor([0.3, 0.0, 0.7]))
    check_shift(parts, indices, alpha=torch.tensor([0.3, 1.0, 0.7], dtype=dtype), orientation="input")
    check_shift(parts, indices, alpha=0.4, orientation="input", scaling=0.5, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_computed_alpha(shape, dtype):
    """cos(h_know, h_input) of every token, where no encoder comes between; inputs that resemble what is known
    of them, and enough of them that plain torch's error says something: that of a single alpha may be nearly 0."""
    h, q, keys, values = here(inputs(16, **SHAPES[shape], dtype=dtype))
    known = reference.knowledge_attention(q, keys, values, here(ids(16, 5))).flatten(1)
    parts = (h + 2 * known.to(dtype), q, keys, values)
    for orientation in ("knowledge", "input"):
        for clamp in (True, False):
            options = {"orientation": orientation, "clamp": clamp}
            check_shift(parts, ids(16, 5), **options)
            check_shift(parts, ids(2, 5), token_to_case=torch.tensor([1, -1, 0] * 5 + [0]), **options)
    assert check_shift((h * 0, *parts[1:]), ids(16, 5))[1].tolist() == [0.0] * 16  # a zero vector has cosine 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 15, 40])
def test_items_of_a_case(tokens, dtype):
    parts = inputs(tokens, **SHAPES["7 heads on 1"], dtype=dtype)
    options = on_cases(tokens)
    check_shift(parts, **options, alpha=torch.rand(3))
    check_shift(parts, **options, alpha=torch.rand(tokens), orientation="input")
    check_shift(parts, **options, alpha=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw(dtype):
    parts = here(inputs(16, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype))
    for rescale in (True, False):
        for orientation in ("knowledge", "input"):
            check_shift(parts, ids(16, 5), alpha=torch.rand(16), rescale=rescale, orientation=orientation)
            check_shift(parts, ids(16, 5), rescale=rescale, orientation=orientation)
    parts[0][0] = 0
    parts[3][:4] = 0
    check_shift(parts, ids(16, 5), alpha=0.6)
    check_shift(inputs(4, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype), **on_cases(4), alpha=0.6)


@pytest.mark.parametrize("k", [0, 1, 17, 128])
def test_any_number_of_items(k):
    check_shift(inputs(2, items=max(k, 1)), ids(2, k, items=max(k, 1)), alpha=0.5)


def test_mixed_dtypes_and_views():
    h, q, keys, values = here(inputs(3))
    parts = [h.bfloat16(), q.half(), keys, values.bfloat16()]
    straight = check_shift(parts, ids(3, 5), alpha=0.5)[0]
    assert straight.dtype == torch.bfloat16
    for view in (shifted, strided):
        check_shift([view(t) for t in parts], ids(3, 5).mT.contiguous().mT, alpha=view(torch.rand(2, 3))[0])


@pytest.mark.parametrize(("orientation", "untouched"), [("knowledge", 0.0), ("input", 1.0)])
def test_rows_that_are_not_retrieved_do_not_leak(orientation, untouched):
    h, q, keys, values = here(inputs(6))
    h[0] = math.nan  # a token of no case: passes as it is
    h[1, 0] = -0.0
    keys[0] = values[0] = math.nan
    cases = torch.tensor([-1, 1, 0, 2, -1, 2])
    indices = torch.tensor([[1, 2], [-1, -1], [4, -1]])
    with poisoned(cpu_kernels):
        out, used = ops.knowledge_shift(
            h, q, keys, values, indices, alpha=0.5, token_to_case=cases, orientation=orientation, backend="cpu"
        )
    assert out[1:].isfinite().all() and out[0].isnan().all() and out[1, 0].signbit()
    assert used.tolist() == [0.5, untouched, 0.5]
    assert torch.equal((out == h).all(-1), torch.tensor([False, True, False, False, True, False]))
    values.fill_(math.nan)  # where the knowledge has no weight nothing of it is looked at
    alone = ops.knowledge_shift(
        h, q, keys, values, indices, alpha=untouched, token_to_case=cases, orientation=orientation, backend="cpu"
    )[0]
    assert torch.equal(alone.view(torch.int32), h.view(torch.int32))


def test_no_tokens_and_no_items():
    assert check_shift(inputs(0), ids(0, 2), alpha=0.5)[0].shape == (0, 64)
    check_shift(inputs(2, items=0), torch.zeros(2, 3, dtype=torch.long), alpha=0.5)
    none = torch.zeros(0, dtype=torch.long)
    assert check_shift(inputs(0), ids(2, 2), token_to_case=none, alpha=0.5)[1].tolist() == [0.5, 0.0]


# ------------------------------------------------------------------------------------------------------ selection


@pytest.fixture
def counted(monkeypatch):
    calls = []
    for name in ("extra_neurons", "extra_neurons_", "knowledge_shift"):
        real = getattr(cpu_kernels, name)
        monkeypatch.setattr(cpu_kernels, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return calls


def test_auto_takes_it_for_few_tokens_without_gradients(counted):
    args, options = here(make(2, "sc"))
    ops.extra_neurons(**args, **options)
    ops.extra_neurons_(torch.zeros(2, 56), **args, **options)
    h, q, keys, values = here(inputs(2))
    ops.knowledge_shift(h, q, keys, values, here(ids(2, 3)), alpha=0.5)
    assert counted == ["extra_neurons", "extra_neurons_", "knowledge_shift"]
    ops.extra_neurons(**args, **options, backend="reference")
    ops.extra_neurons(**to64(args), **options)
    ops.extra_neurons(**(args | {"values": args["values"].clone().requires_grad_()}), **options)
    ops.knowledge_shift(h, q, keys, values, here(ids(2, 3)), encoder=[here(layer(64, 64))])  # alpha behind an encoder
    ops.knowledge_shift(h, q, keys, values, here(ids(2, 3)), alpha=0.5, out_proj=here(layer(64, 64)))
    many, more = here(make(cpu_kernels.MOST_TOKENS + 1, "sc"))
    ops.extra_neurons(**many, **more)
    ops.knowledge_shift(
        *here(inputs(cpu_kernels.MOST_TOKENS + 1)), here(ids(cpu_kernels.MOST_TOKENS + 1, 3)), alpha=0.5
    )
    args, options = here(make(16, "", sizes=(cpu_kernels.MOST_PRODUCTS // 16 + 1,), d=2, d_out=2))
    ops.extra_neurons(**args, **options)  # always on, and more than pay
    assert len(counted) == 3
    ops.extra_neurons(**(args | {"x": args["x"][:8]}), **options)
    assert len(counted) == 4


def test_by_name_it_runs_everywhere_it_can_and_differentiates_as_the_reference(counted):
    args, options = here(make(20, "rc", dtype=torch.float32))
    grads = []
    for backend in ("cpu", "reference"):
        leaves = {k: t.clone().requires_grad_() for k, t in args.items() if t is not None}
        found = ops.extra_neurons(**leaves, **options, backend=backend)
        grads.append(torch.autograd.grad(found.square().nansum(), list(leaves.values())))
    assert counted == ["extra_neurons"]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)  # y itself differs by rounding
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: it takes float16"):
        ops.extra_neurons(**to64(args), **options, backend="cpu")
    with pytest.raises(ValueError, match="it runs on the CPU, not on cuda"):
        backends.resolve("cpu", torch.device("cuda"), torch.float32)


def test_without_the_module_auto_is_the_reference_and_the_name_says_why(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: (None, f"built without {name}"))
    args, options = here(make(2, "sc"))
    found = ops.extra_neurons(**args, **options)
    assert torch.equal(found, reference.extra_neurons(**args, **options))
    assert backends.resolve("auto", torch.device("cpu"), torch.float32) == "reference"
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: built without _cpu"):
        ops.extra_neurons(**args, **options, backend="cpu")
    assert {b.name: b.reason for b in backends.available()}["cpu"] == "built without _cpu"


# ----------------------------------------------------------------------------------------- no product in half precision


class Products(TorchDispatchMode):
    """The dtypes that matrix products are given inside, and the largest tensor of float32 that is made."""

    def __init__(self):
        super().__init__()
        self.seen, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(word in str(function) for word in ("mm", "matmul", "linear", "addmv", "aten.mv", "dot")):
            self.seen |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
def test_a_search_widens_half_precision_tile_by_tile_and_multiplies_in_single(dtype, normed):
    keys, q = torch.randn(20_000, 32).to(dtype), torch.randn(3, 32).to(dtype)
    norm = torch.linalg.vector_norm(keys.float(), dim=1) if normed else None
    for backend in ("auto", "cpu", "reference"):
        with Products() as products:
            scores, indices = reference.cosine_topk(q, keys, 5, key_norm=norm)
        assert products.seen == {torch.float32} and products.largest <= 8192 * 32
        found = ops.cosine_topk(q, keys, 5, key_norm=norm, backend=backend)
        assert torch.equal(found[1], indices)
        torch.testing.assert_close(found[0], scores, rtol=0, atol=0 if backend == "reference" else 1e-6)
    exact = reference.cosine_topk(q.double(), keys.double(), 5, key_norm=norm)
    assert torch.equal(indices, exact[1])
    torch.testing.assert_close(scores.double(), exact[0], rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- arguments

CSRC = Path(__file__).resolve().parents[1] / "csrc" / "cpu"


def declared(struct):
    """The fields of a struct of operators.h and their types, in order."""
    text = re.sub(r"//.*", "", (CSRC / "operators.h").read_text())
    found = {}
    for declaration in re.search(rf"struct {struct} {{(.*?)}};", text, re.S)[1].split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const )?(\w+)(.*)", declaration, re.S).groups()
        for name in names.split(","):
            found[name.strip(" *")] = kind + "*" * name.count("*")
    return found


@pytest.mark.parametrize("call", [cpu_kernels.NeuronCall, cpu_kernels.ShiftCall])
def test_what_is_passed_are_the_fields_of_the_struct_in_the_order_in_which_they_are_read(call):
    fields = declared(call.__name__)
    assert call._fields == (*fields, "portable")
    arrays = [name for name, kind in fields.items() if kind == "Array"]
    assert [name for name, default in call._field_defaults.items() if default == (0, 0)] == arrays
    read = (CSRC / "bindings_arguments.h").read_text().split(f"{call.__name__} call;")[1].split("return call;")[0]
    taken = dict(re.findall(r"call\.(\w+) = .*\bin\.(\w+)[<(]", read))
    assert list(taken) == list(fields)
    assert [name for name, how in taken.items() if how == "array"] == arrays
    assert [name for name, how in taken.items() if how == "address"] == [n for n, kind in fields.items() if "*" in kind]


def test_arguments_that_are_no_call_are_refused():
    module = native.cpu()
    for wrong, said in (
        (cpu_kernels.NeuronCall()[:-1], "too few arguments"),
        ((*cpu_kernels.NeuronCall(), 0), "too many arguments"),
        (cpu_kernels.NeuronCall(x=0), "an array is no tuple of its address and dtype"),
        (cpu_kernels.NeuronCall(x=(0, 0, 0)), "too many arguments"),
        (cpu_kernels.NeuronCall(x=(0, 3)), "an option is out of range"),
    ):
        with pytest.raises(ValueError, match=said):
            module.extra_neurons(*wrong)
