"""The gradient kernels of `knowledge_shift` against the reference in float64."""

import math
from functools import partial

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, launches, poisoned, shifted, strided
from shift_bodies import SHAPES, case_tokens, ids, inputs, layer, on_cases, wide
from tolerance import assert_close_to_reference

import unike_kernels as uk
from unike_kernels import reference

NAMES = ("h_input", "q", "item_keys", "item_values")


def leaves_of(parts, alpha, out_proj, encoder):
    """All that a gradient can be wanted for, by name."""
    found = dict(zip(NAMES, parts, strict=True))
    pairs = [("out_proj", out_proj), *((f"encoder {i}", pair) for i, pair in enumerate(encoder or []))]
    for name, pair in pairs:
        if pair is not None:
            found[f"{name} weight"], found[f"{name} bias"] = pair
    found["alpha"] = alpha
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


def gradients(operator, leaves, indices, grads, wanted, options):
    """The gradients of sum(h . grad) + sum(alpha . grad) with respect to the leaves of these names."""
    own = {name: t.detach().requires_grad_(name in wanted) for name, t in leaves.items()}
    layers = [(own[f"{n} weight"], own.get(f"{n} bias")) for n in ("encoder 0", "encoder 1") if f"{n} weight" in own]
    out_proj = (own["out_proj weight"], own.get("out_proj bias")) if "out_proj weight" in own else None
    more = {"encoder": layers or None, "out_proj": out_proj}
    if "alpha" in own:
        more["alpha"] = own["alpha"]
    results = operator(*(own[name] for name in NAMES), indices, **more, **options)
    live = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if r.requires_grad]
    outputs, of_outputs = zip(*live, strict=True)
    found = torch.autograd.grad(outputs, [own[n] for n in wanted], of_outputs, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def check(parts, indices, *, alpha=None, out_proj=None, encoder=None, wanted=None, kernels=None, **options):
    """Every wanted gradient of the kernels is that of the reference."""
    leaves = leaves_of(parts, alpha, out_proj, encoder)
    wanted = list(leaves) if wanted is None else wanted
    options |= {"alpha": alpha} if alpha is not None and "alpha" not in leaves else {}
    triton = partial(uk.ops.knowledge_shift, backend="triton")
    count = reference.knowledge_shift(
        *parts, indices, alpha=alpha, **{k: v for k, v in options.items() if k != "alpha"}, out_proj=out_proj
    )[1].shape
    grads = [torch.randn(parts[0].shape, device=DEVICE).to(parts[0].dtype), torch.randn(count, device=DEVICE)]
    with launches() as counted, poisoned():
        found = gradients(triton, leaves, indices, grads, wanted, options)
    assert counted["knowledge_shift_mix_grad"] == 1 and set(kernels or ()) <= set(counted)
    wide_options = {name: wide(value) for name, value in options.items()}
    exact = gradients(
        reference.knowledge_shift, {n: wide(t) for n, t in leaves.items()}, indices, grads, wanted, wide_options
    )
    same = gradients(reference.knowledge_shift, leaves, indices, grads, wanted, options)
    for name in wanted:
        assert found[name].dtype == leaves[name].dtype and found[name].is_contiguous()
        try:
            assert_close_to_reference(found[name], exact[name], same[name], 3)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_alpha(shape, dtype):
    parts = inputs(3, **SHAPES[shape], dtype=dtype)
    indices = ids(3, 5)
    check(parts, indices, alpha=torch.tensor([0.3, 0.0, 0.7], device=DEVICE), kernels=["knowledge_shift_items_grad"])
    check(parts, indices, alpha=0.4, orientation="input", scaling=0.5, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 66])
def test_items_of_a_case(tokens, dtype):
    parts = inputs(tokens, **SHAPES["7 heads on 1"], dtype=dtype)
    options = on_cases(tokens)
    check(parts, alpha=torch.rand(3, device=DEVICE), kernels=["knowledge_shift_case_sum"], **options)
    check(parts, alpha=torch.rand(tokens, device=DEVICE), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("clamp", [True, False])
def test_raw(clamp, rescale, dtype):
    parts = inputs(6, heads=1, kv_heads=1, hd=70, hv=70, dtype=dtype)
    options = {"rescale": rescale, "clamp": clamp}
    check(parts, ids(6, 5), orientation="knowledge" if clamp else "input", **options)
    cases = on_cases(6)
    check(parts, case_tokens=case_tokens(cases["token_to_case"], 3), **cases, **options)
    check(parts, **cases, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["identity", "silu"])
def test_projection_and_encoder(act, dtype):
    parts = inputs(18, heads=4, kv_heads=2, hd=16, hv=16, d=72, dtype=dtype)
    encoder = [layer(40, 72, dtype), layer(72, 40, dtype, bias=False)]
    options = {"encoder": encoder, "encoder_act": act, "out_proj": layer(72, 64, dtype), "clamp": False}
    kernels = ["knowledge_shift_outer", "knowledge_shift_cosine_grad"]
    check(parts, ids(18, 5), kernels=kernels, **options)
    cases = on_cases(18)
    check(parts, case_tokens=case_tokens(cases["token_to_case"], 3), **cases, **options)


def test_only_what_is_wanted_and_views():
    parts = [view(t) for view, t in zip((shifted, strided, shifted, strided), inputs(5), strict=True)]
    out_proj, encoder = layer(64, 64), [layer(64, 64)]
    every = check(parts, ids(5, 4), out_proj=out_proj, encoder=encoder, clamp=False)
    for name in every:
        check(parts, ids(5, 4), out_proj=out_proj, encoder=encoder, clamp=False, wanted=[name])


def test_three_runs_are_equal_where_tokens_share_items():
    parts = inputs(20, items=5, dtype=torch.bfloat16)
    options = {"indices": ids(20, 4, items=5), "kernels": ["knowledge_shift_items_grad"]}
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(check(parts, alpha=torch.full((20,), 0.5, device=DEVICE), **options))
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


@pytest.mark.parametrize("form", ["alpha", "cosine"])
def test_what_is_left_alone_has_the_gradient_of_the_identity(form):
    h, q, keys, values = inputs(4)
    keys[0] = values[0] = math.nan
    weight = torch.full((64, 64), math.nan, device=DEVICE)
    leaves = [t.requires_grad_() for t in (h, q, keys, values, weight)]
    alpha = torch.tensor(0.5, device=DEVICE).expand(4) if form == "alpha" else None
    encoder = [layer(64, 64)]
    indices = torch.full((4, 2), -1, device=DEVICE)
    with poisoned():
        out, used = uk.ops.knowledge_shift(
            h, q, keys, values, indices, alpha=alpha, out_proj=(weight, None), encoder=encoder, backend="triton"
        )
        found = torch.autograd.grad(out.sum() + used.sum(), leaves)
    assert found[0].eq(1).all() and all(gradient.eq(0).all() for gradient in found[1:])


def test_a_second_backward_is_refused():
    parts = [t.requires_grad_() for t in inputs(2)]
    out, _ = uk.ops.knowledge_shift(*parts, ids(2, 3), alpha=0.5, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
