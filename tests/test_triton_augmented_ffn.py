"""The augmented_ffn kernels: against the reference in float64, on both sides of every branch, from poisoned memory."""

from typing import Any

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference
from unike_kernels.triton_kernels import tuning

BOTH = {"augmented_ffn_hidden": 1, "augmented_ffn_output": 1}


def arguments(
    tokens: int,
    d: int = 72,
    width: int = 150,
    n: int = 21,
    *,
    gated: bool = True,
    act: str = "silu",
    dtype: torch.dtype = torch.float32,
    biases: bool = True,
    zeta: bool = True,
) -> dict[str, Any]:
    """Random arguments of augmented_ffn, scaled so that every sum is of order one."""

    def rand(*shape: int, fan: int = 1) -> torch.Tensor:
        return (torch.randn(shape) / fan**0.5).to(DEVICE, dtype)

    given: dict[str, Any] = {
        "x": rand(tokens, d),
        "w_k": rand(width, d, fan=d),
        "b_k": rand(width) if biases else None,
        "w_v": rand(d, width, fan=max(1, width)),
        "b_v": rand(d) if biases else None,
        "keys": rand(n, d, fan=d),
        "key_bias": rand(n) if biases else None,
        "values": rand(n, d, fan=max(1, n)),
        "act": act,
        "zeta": rand(d) if zeta else None,
        "beta": 0.5,
    }
    if gated:
        given |= {"w_up": rand(width, d, fan=d), "b_up": rand(width) if biases else None}
        given |= {"up": rand(n, d, fan=d), "up_bias": rand(n) if biases else None}
    return given


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def check(given: dict[str, Any], kernels: dict[str, int] = BOTH) -> torch.Tensor:
    with poisoned(), launches() as counted:
        y = ops.augmented_ffn(**given, backend="triton")
    assert dict(counted) == kernels
    exact, plain = (reference.augmented_ffn(**cast(given, dtype)) for dtype in (torch.float64, torch.float32))
    assert_close_to_reference(y, exact, plain.to(y.dtype), factor=2)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 64])
def test_error_is_that_of_rounding(tokens, gated, dtype):
    check(arguments(tokens, gated=gated, dtype=dtype))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 300])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_any_number_of_extra_neurons(n, gated):
    check(arguments(3, n=n, gated=gated, dtype=torch.bfloat16))


@pytest.mark.parametrize("act", list(reference.ACTIVATIONS))
def test_every_activation(act):
    check(arguments(5, act=act, gated=False))
    check(arguments(5, act=act, gated=True, biases=False, zeta=False))


@pytest.mark.parametrize("width", [1, 15, 64, 65])
def test_any_width(width):
    check(arguments(4, d=33, width=width, n=5, dtype=torch.float16))


def test_without_base_neurons_and_without_any():
    check(arguments(4, width=0))
    check(arguments(4, width=0, n=0), {"augmented_ffn_output": 1})


def test_no_tokens():
    given = arguments(0)
    assert ops.augmented_ffn(**given, backend="triton").shape == (0, 72)


@pytest.mark.parametrize("change", [shifted, strided], ids=["shifted", "strided"])
def test_views(change):
    given = arguments(7, dtype=torch.bfloat16)
    moved = {name: change(v) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for name, v in given.items()}
    y = ops.augmented_ffn(**moved, backend="triton")
    assert torch.equal(y, check(given))
    given["w_v"] = given["w_v"].t().contiguous().t()  # copied
    assert torch.equal(ops.augmented_ffn(**given, backend="triton"), y)


@pytest.mark.parametrize("x", DTYPES, ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes(x, base, extra):
    given = arguments(6)
    for name in ("w_k", "b_k", "w_v", "b_v", "w_up", "b_up"):
        given[name] = given[name].to(base)
    for name in ("keys", "key_bias", "values", "up", "up_bias", "zeta"):
        given[name] = given[name].to(extra)
    check({**given, "x": given["x"].to(x)})


@pytest.mark.parametrize("programs", [1, 6, 64])
def test_splits_in_any_number_and_other_tiles(programs, monkeypatch):
    """1: no split; 6 and 64: several, down to one chunk each. The sum's order is fixed, so three runs are equal."""
    tiles = {"BM": 32, "BK": 32, "num_warps": 4, "num_stages": 2}
    rows = [
        tuning.Row("augmented_ffn_hidden", 0, {}, tiles),
        tuning.Row("augmented_ffn_output", 0, {}, {**tiles, "programs": programs}),
    ]
    monkeypatch.setattr(tuning, "ROWS", [*rows, *tuning.ROWS])
    given = arguments(20, dtype=torch.bfloat16)
    first = check(given)
    assert all(torch.equal(first, ops.augmented_ffn(**given, backend="triton")) for _ in range(2))


def test_tokens_do_not_see_each_other():
    given = arguments(9)
    y = check(given)
    given["x"] = given["x"].clone()
    given["x"][4, 0] = float("nan")
    changed = ops.augmented_ffn(**given, backend="triton")
    assert changed[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(changed[others], y[others])


def test_extra_rows_are_as_good_as_concatenated_ones():
    """Extra neurons = rows of a wider base FFN, exactly the definition of the operator."""
    given = arguments(6, zeta=False)
    wide = {
        **given,
        "w_k": torch.cat([given["w_k"], given["keys"]]),
        "b_k": torch.cat([given["b_k"], given["key_bias"]]),
        "w_v": torch.cat([given["w_v"], given["values"].t()], dim=1),
        "w_up": torch.cat([given["w_up"], given["up"]]),
        "b_up": torch.cat([given["b_up"], given["up_bias"]]),
    }
    for name in ("keys", "key_bias", "values", "up", "up_bias"):
        wide[name] = wide[name][:0]
    torch.testing.assert_close(check(wide), check(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_many_tokens_take_the_base_ffn_and_the_kernel_of_extra_neurons(gated, dtype):
    for tokens in (65, 128):
        given = arguments(tokens, gated=gated, dtype=dtype)
        with poisoned(), launches() as counted:
            y = ops.augmented_ffn(**given, backend="triton")
        assert counted and not any(name.startswith("augmented_ffn") for name in counted)
        exact, plain = (reference.augmented_ffn(**cast(given, wide)) for wide in (torch.float64, torch.float32))
        assert_close_to_reference(y, exact, plain.to(dtype), factor=2)


# -------------------------------------------------------------------------------------------------------- gradients


def gradients(module: Any, given: dict[str, Any], wanted: list[str], grad: torch.Tensor, **more: Any) -> list[Any]:
    leaves = {name: given[name].detach().clone().requires_grad_() for name in wanted}
    y = module.augmented_ffn(**{**given, **leaves}, **more)
    return list(torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype), materialize_grads=True))


def check_gradients(given: dict[str, Any], wanted: list[str] | None = None) -> None:
    wanted = wanted or [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    grad = torch.randn_like(given["x"])
    with poisoned():
        found = gradients(ops, given, wanted, grad, backend="triton")
    exact = gradients(reference, cast(given, torch.float64), wanted, grad)
    plain = gradients(reference, cast(given, torch.float32), wanted, grad)
    for name, g, e, p in zip(wanted, found, exact, plain, strict=True):
        assert g.dtype == given[name].dtype and g.is_contiguous()
        assert_close_to_reference(g, e, p.to(g.dtype), factor=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("act", list(reference.ACTIVATIONS))
def test_all_gradients(act, gated, dtype):
    check_gradients(arguments(12, act=act, gated=gated, dtype=dtype))


@pytest.mark.parametrize(
    "wanted",
    [["x"], ["zeta"], ["values", "zeta"], ["keys", "key_bias", "up"], ["w_v"], ["b_v", "up_bias"], ["w_up", "b_k"]],
)
def test_only_the_gradients_asked_for(wanted):
    check_gradients(arguments(5), wanted)
    check_gradients({**arguments(5), "beta": 0.0}, ["x", *(name for name in wanted if name != "x")])


def test_gradients_without_neurons_or_tokens():
    check_gradients(arguments(5, n=0))
    check_gradients(arguments(5, width=0))
    check_gradients(arguments(0))


def test_gradients_of_several_dtypes_and_in_chunks(monkeypatch):
    monkeypatch.setattr("unike_kernels.triton_kernels.augmented_ffn_backward.CHUNK", 4)
    given = arguments(10, dtype=torch.bfloat16)
    for name in ("keys", "key_bias", "values", "up", "up_bias", "zeta"):  # edits in training, on a base in half
        given[name] = given[name].float()
    check_gradients(given)


def test_autocast_changes_nothing():
    given = arguments(70)
    plain = ops.augmented_ffn(**given, backend="triton")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(ops.augmented_ffn(**given, backend="triton"), plain)
