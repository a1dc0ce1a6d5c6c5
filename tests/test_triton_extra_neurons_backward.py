"""The gradients of extra_neurons in Triton against those of the reference."""

import pytest
import torch
from kernel_tools import DTYPES, launches, poisoned
from neuron_inputs import ROUTINGS, make, to64
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference

extra_neurons_backward = pytest.importorskip("unike_kernels.triton_kernels.extra_neurons_backward")


def gradients(function, args, options, dy):
    """The gradient of every tensor of args."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in args.items() if t is not None}
    y = function(**{**args, **leaves}, **options)
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def check(args, options):
    dy = torch.randn(*args["x"].shape[:-1], args["values"].shape[1]).to(args["x"])
    with poisoned():
        found = gradients(ops.extra_neurons, args, options | {"backend": "triton"}, dy)
    exact = gradients(reference.extra_neurons, to64(args), options, dy)
    wide = {name: None if t is None else t.float() for name, t in args.items()}
    plain = gradients(reference.extra_neurons, wide, options, dy)
    for name, gradient in found.items():
        assert gradient.dtype == args[name].dtype and gradient.is_contiguous()
        assert_close_to_reference(gradient, exact[name], plain[name].to(gradient.dtype), factor=3)
        assert (gradient[exact[name] == 0] == 0).all(), name
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_rounding(routing, dtype):
    with launches() as counted:
        check(*make(17, routing, dtype=dtype))
    assert counted["hidden_grads"] == 1


@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "silu", "identity"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(act, gated):
    # 48 weights of a route: each of their gradients is a sum that cancels, and a few say nothing of the usual error.
    sizes = {"sizes": (3, 2, 4, 1, 6, 2), "cases": 8}
    check(*make(40, "rc", act=act, gated=gated, zeta=1, d=24, d_out=24, bias=gated, **sizes))


@pytest.mark.parametrize("tokens", [0, 1, 16, 70])
@pytest.mark.parametrize("sizes", [(), (0,), (33,), (1,) * 300])
def test_sizes(tokens, sizes):
    check(*make(tokens, "rc", sizes=sizes, d=24, d_out=24))
    check(*make(tokens, "", sizes=sizes, d=24, d_out=24, spare=0))


def test_chunks_of_neurons_add_up(monkeypatch):
    args, options = make(20, "rc", sizes=(100, 60, 0, 120), d=24, d_out=24)
    monkeypatch.setattr(extra_neurons_backward, "WORKSPACE", 1)
    with launches() as counted:
        check(args, options)
    assert counted["hidden_grads"] == 3


def test_no_pointers_are_one_group():
    args, options = make(5, "r", sizes=(19,), zeta=1, spare=0)
    check(args, options | {"group_ptr": None})


def test_three_runs_are_the_same_bits():
    args, options = make(40, "src")
    dy = torch.randn(40, 56).to(args["x"])
    runs = [gradients(ops.extra_neurons, args, options | {"backend": "triton"}, dy) for _ in range(3)]
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in run)


def test_only_the_gradients_asked_for_and_only_once():
    args, options = make(5, "sc")
    full = check(args, options)
    options |= {"backend": "triton"}
    for name in full:
        leaf = args[name].detach().clone().requires_grad_()
        y = ops.extra_neurons(**{**args, name: leaf}, **options)
        (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward()
