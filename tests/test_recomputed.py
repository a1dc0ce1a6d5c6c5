"""Gradient checkpointing: layers that run again in a backward pass run as they ran before, edits on or off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model

CONFIGS = {"always": ALWAYS, "routed": ROUTED}


def edited_and_base(model: Any, handle: uk.PatchHandle, inputs: Any, other: Any) -> None:
    loss = model(**inputs, use_cache=False).logits.square().mean()
    with handle.disabled():
        loss = loss + model(**other, use_cache=False).logits.square().mean()
    loss.backward()


def base_and_edited(model: Any, handle: uk.PatchHandle, inputs: Any, other: Any) -> None:
    with handle.disabled():
        loss = model(**other, use_cache=False).logits.square().mean()
    (loss + model(**inputs, use_cache=False).logits.square().mean()).backward()


def base_alone(model: Any, handle: uk.PatchHandle, inputs: Any, other: Any) -> None:
    with handle.disabled():
        loss = model(**inputs, use_cache=False).logits.square().mean()
    loss.backward()


def backward_inside_disabled(model: Any, handle: uk.PatchHandle, inputs: Any, other: Any) -> None:
    loss = model(**inputs, use_cache=False).logits.square().mean()
    with handle.disabled():
        loss.backward()
        assert not handle.record.runtime.enabled  # as it was before the backward pass


def a_hidden_state_after_another_pass(model: Any, handle: uk.PatchHandle, inputs: Any, other: Any) -> None:
    loss = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-2].square().mean()
    with torch.no_grad():
        model(**other, use_cache=False)
    loss.backward()


WAYS = (edited_and_base, base_and_edited, base_alone, backward_inside_disabled, a_hidden_state_after_another_pass)


def gradients(way: Callable[..., None], config: Any, reentrant: bool | None) -> torch.Tensor:
    model = make_model("llama").train()
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model, config, prompts=inputs)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    handle = uk.patch(model, edits)
    way(model, handle, inputs, inputs_for(model, (5, 3), seed=5))
    assert handle.record.runtime.enabled and handle.record.runtime.before is None
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_without_checkpointing(way: Any, config: str, reentrant: bool) -> None:
    plain, again = (gradients(way, CONFIGS[config], r) for r in (None, reentrant))
    # of sums in another order; what these tests are about was off by 2 % to 600,000 % of the largest
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=2e-5 * float(plain.abs().max()))


def test_a_failing_backward_pass_leaves_the_patch_as_it_was() -> None:
    model = make_model("llama").train()
    inputs = inputs_for(model, (5, 3))
    handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    logits = model(**inputs, use_cache=False).logits

    def fail(grad: torch.Tensor) -> None:
        raise ValueError("no")

    model.model.layers[0].self_attn.q_proj.weight.register_hook(fail)
    with handle.disabled():
        with pytest.raises(ValueError, match="no"):
            logits.sum().backward()
        base = model(**inputs, use_cache=False).logits
    handle.remove()
    assert torch.equal(base, model(**inputs, use_cache=False).logits)
