"""What is precomputed of an affine encoder: exact, followed by swaps, refreshes and moves, and left to inference."""

from dataclasses import replace

import pytest
import torch
from tolerance import assert_close_to_reference

import unike_kernels as uk
from tests.kernel_tools import launches
from tests.models_tiny import ALWAYS, edits_for, inputs_for, make_model
from unike_kernels import folding, reference


def encoder_of(d, dtype, depth=2):
    return [((torch.randn(d, d) / d**0.5).to(dtype), torch.randn(d).to(dtype)) for _ in range(depth)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once(dtype):
    encoder, weight, bias = encoder_of(64, dtype), torch.randn(64, 48).to(dtype), torch.randn(64).to(dtype)
    values = torch.randn(70, 64).to(dtype)
    wide = [(w.double(), b.double()) for w, b in encoder]
    exact, same = reference.encode(values.double(), wide), reference.encode(values, encoder)
    assert_close_to_reference(folding.encoded_rows(values, encoder), exact, same, 2)
    heads = torch.randn(9, 48).double()
    w, b = (t.double() for t in folding.folded(weight, bias, encoder))
    exact = reference.encode(heads, [(weight.double(), bias.double()), *wide])
    cosine = torch.nn.functional.cosine_similarity(heads @ w.T + b, exact, dim=1)
    assert (1 - cosine).max() < torch.finfo(dtype).eps ** 2 + 1e-12
    no_bias = folding.folded(weight, None, encoder)[1]
    torch.testing.assert_close(no_bias, reference.encode(torch.zeros(64, dtype=dtype), encoder))
    assert folding.encoded_rows(values[:0], encoder).shape == (0, 64)


def test_what_is_made_is_there_for_other_streams(monkeypatch):
    waited = []
    monkeypatch.setattr(folding, "wait_for_stream", waited.append)
    encoder, weight = encoder_of(8, torch.float32), torch.randn(8, 8)
    folding.encoded_rows(weight, encoder), folding.folded(weight, None, encoder)
    assert waited == [weight.device] * 2


def patched(attention, per, name="llama", **more):
    shift = replace(ALWAYS.shift, attention=attention, per=per)
    config = replace(ALWAYS, shift=shift, **more)
    model = make_model(name, layers=2)
    inputs = inputs_for(model, (5, 3, 4))
    prompts = {k: v[:2] for k, v in inputs.items()}
    return model, inputs, partial_edits(model, config, prompts)


def partial_edits(model, config, prompts, **more):
    return edits_for(model, config, prompts=prompts, layers=(1,), **more)


@pytest.mark.parametrize("per", ["case", "token"])
@pytest.mark.parametrize("attention", ["projected", "raw"])
def test_models_say_the_same_with_what_is_precomputed(attention, per):
    model, inputs, edits = patched(attention, per, "opt")
    other = partial_edits(model, edits.config, {k: v[:2] for k, v in inputs.items()}, seed=5)
    with torch.no_grad():
        with uk.patch(model, edits, backend="reference") as handle:
            expected = model(**inputs).logits
            assert handle.record.layers[0].shift.encoder_rows is None
            handle.swap(other)
            swapped = model(**inputs).logits
        with uk.patch(model, edits, backend="triton", max_items=20) as handle:
            shift = handle.record.layers[0].shift
            known = shift.encoder_rows if attention == "raw" else shift.folded_weight
            where = known.data_ptr()
            with launches() as counted:
                torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
            shifts = {name: count for name, count in counted.items() if name.startswith("knowledge_shift")}
            started = {"knowledge_shift_attend"} if attention == "raw" else {"knowledge_shift_project"}
            if (attention, per) == ("projected", "case"):  # the case tokens' alpha, then the mix before the projection
                started = {"knowledge_shift_project", "knowledge_shift_attend"}
            assert set(shifts) == started
            handle.swap(other)
            torch.testing.assert_close(model(**inputs).logits, swapped, rtol=1e-4, atol=1e-5)
            now = shift.encoder_rows if attention == "raw" else shift.folded_weight
            assert now.data_ptr() == where  # captured graphs follow


def test_a_projection_that_changed_is_folded_again_on_refresh():
    model, inputs, edits = patched("projected", "token")
    with torch.no_grad(), uk.patch(model, edits, backend="triton") as handle:
        shift, before = handle.record.layers[0].shift, handle.record.layers[0].shift.folded_weight.clone()
        model.model.layers[1].self_attn.o_proj.weight.mul_(2)
        handle.refresh()
        torch.testing.assert_close(shift.folded_weight, 2 * before)
        model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: None)
        handle.refresh()  # it is called from now on, and never read
        assert shift.folded_weight is None
        called = model(**inputs).logits
    with torch.no_grad(), uk.patch(model, edits, backend="reference"):
        torch.testing.assert_close(called, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["a forward of its own", "a hook on all modules"])
def test_a_projection_that_others_stand_around_is_called(how):
    """What they make of its output, here twice of it, is part of what is known."""
    model, inputs, edits = patched("projected", "case")
    projection = model.model.layers[1].self_attn.o_proj

    def twice(module, args, output):
        return 2 * output if module is projection else None

    if how == "a forward of its own":
        projection.forward = lambda x: 2 * torch.nn.functional.linear(x, projection.weight)
    hook = torch.nn.modules.module.register_module_forward_hook(twice) if how == "a hook on all modules" else None
    with torch.no_grad():
        try:
            with uk.patch(model, edits, backend="reference"):
                found = model(**inputs).logits
        finally:
            if hook is not None:
                hook.remove()
        vars(projection).pop("forward", None)
        projection.weight.mul_(2)
        with uk.patch(model, edits, backend="reference"):
            torch.testing.assert_close(found, model(**inputs).logits)


def test_gradients_take_the_encoder_itself_and_an_activation_leaves_nothing_to_fold():
    model, inputs, edits = patched("projected", "token")
    with uk.patch(model, edits, backend="triton") as handle:
        shift = handle.record.layers[0].shift
        weight = model.model.layers[1].self_attn.o_proj.weight
        (grad,) = torch.autograd.grad(model(**inputs).logits.square().sum(), weight)
        assert grad.abs().max() > 0
        assert shift.half().folded_weight.dtype == torch.float16
    model, _, edits = patched("projected", "token", encoders=replace(ALWAYS.encoders, activation="gelu"))
    with uk.patch(model, edits, backend="triton") as handle:
        assert handle.record.layers[0].shift.folded_weight is None


def test_what_is_moved_to_kernels_later_is_precomputed_there(monkeypatch):
    model, inputs, edits = patched("raw", "case")
    with torch.no_grad(), uk.patch(model, edits) as handle:
        shift = handle.record.layers[0].shift
        expected = model(**inputs).logits
        assert shift.encoder_rows is None
        shift.backend = "triton"  # as after .cuda()
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert shift.encoder_rows.shape == shift.memory.values.shape
