"""Hooks of a patch as a `forward` of the instance: what torch's would do, whatever others do to the module."""

import copy
import inspect
import pickle
import warnings

import accelerate
import pytest
import torch
from torch import nn

import unike_kernels as uk
from tests.models_tiny import ROUTED, edits_for, inputs_for, make_model
from unike_kernels.forwards import HookedForward, hook_after, hook_before


class Note:
    """A hook that says its name, and may change what it sees."""

    def __init__(self, name, calls, change=None):
        self.name, self.calls, self.change = name, calls, change

    def __call__(self, module, args, kwargs, *output):
        self.calls.append(self.name)
        return None if self.change is None else self.change(*output) if output else ((self.change(*args),), kwargs)


def double(x):
    return 2 * x


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_hooks_run_in_order_and_change_what_goes_in_and_out(kind):
    module, calls = kind(4, 4) if kind is nn.Linear else kind(4), []
    x, own = torch.randn(3, 4), dict(vars(module))
    expected = 2 * module(2 * x)
    handles = [hook_before(module, Note("before", calls, double)), hook_after(module, Note("first", calls))]
    handles += [hook_after(module, Note("second", calls, double))]
    assert isinstance(vars(module)["forward"], HookedForward)
    assert not module._forward_hooks and not module._forward_pre_hooks
    assert inspect.signature(module.forward) == inspect.signature(
        kind(4, 4).forward if kind is nn.Linear else kind(4).forward
    )
    torch.testing.assert_close(module(x), expected)
    assert calls == ["before", "first", "second"]
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(same(x), expected)
        assert vars(same)["forward"].module is same
    for handle in handles:
        handle.remove()
    assert vars(module) == own


def test_modules_with_hooks_or_a_forward_of_others_get_hooks_of_torch():
    hooked, replaced, calls = nn.Linear(4, 4), nn.Linear(4, 4), []
    hooked.register_forward_hook(lambda module, args, output: calls.append("other"))
    replaced.forward = lambda x: nn.Linear.forward(replaced, 3 * x)
    for module in (hooked, replaced):
        handle = hook_after(module, Note("ours", calls, double))
        assert not isinstance(vars(module).get("forward"), HookedForward) and len(module._forward_hooks) > 0
        module(torch.randn(1, 4))
        handle.remove()
    assert calls == ["other", "ours", "ours"]


def test_a_failure_is_heard():
    module, heard = nn.Linear(4, 4), []
    hook_after(module, lambda module, args, kwargs, output: heard.append(output), watched=True)
    with pytest.raises(RuntimeError):
        module(torch.randn(1, 3))
    assert heard == [None]


def test_a_parametrised_linear_computes_with_its_parametrisation():
    module = nn.Linear(4, 4)
    hook_after(module, Note("ours", []))
    nn.utils.parametrizations.weight_norm(module)
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), x @ module.weight.T + module.bias)


def replaced(module):
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def put_around(module):
    there = module.forward
    module.forward = lambda *args, **kwargs: there(*args, **kwargs)


def dispatched(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


@pytest.mark.parametrize("how", [replaced, put_around, dispatched])
def test_an_edit_acts_once_whatever_becomes_of_the_forwards(how):
    model = make_model("opt")
    inputs = inputs_for(model, (5, 3))
    with torch.no_grad():
        base = model(**inputs).logits
        handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
        expected = model(**inputs).logits
        assert not torch.allclose(expected, base)
        layer = model.model.decoder.layers[2]
        for module in (layer.self_attn, layer.self_attn.q_proj, layer.self_attn.out_proj, layer.fc1, layer.fc2):
            how(module)
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, expected)
        if how is dispatched:
            accelerate.hooks.remove_hook_from_submodules(model)
            torch.testing.assert_close(model(**inputs).logits, expected)
        handle.remove()
        assert torch.equal(model(**inputs).logits, base)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("how", [replaced, put_around])
def test_labels_that_a_replaced_forward_hides_are_warned_of_and_seen_again(how):
    model = make_model("llama")
    inputs = inputs_for(model, (6, 6))
    tracker = uk.patch(model, edits_for(model, ROUTED, prompts=inputs)).record.runtime.tracker
    labels = inputs["input_ids"].masked_fill(torch.arange(6) < 4, -100)
    model(**inputs, labels=labels)
    how(model)
    with warnings.catch_warnings(record=True) as caught:
        model(**inputs, labels=labels)
    warned = any("the forward of LlamaForCausalLM was replaced" in str(w.message) for w in caught)
    assert warned == (how is replaced)
    for _ in range(2):
        assert tracker.current.case_tokens.tolist() == [3, 9] or warned
        warned = False
        model(**inputs, labels=labels)


def test_a_model_that_accelerate_unwraps_is_still_edited():
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    unwrapped = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    fresh = make_model("llama")
    uk.patch(fresh, edits_for(fresh, ROUTED, prompts=inputs))
    for _ in range(2):
        torch.testing.assert_close(unwrapped(**inputs).logits, fresh(**inputs).logits)


def test_what_others_do_to_the_heads_reaches_the_knowledge():
    """Their pre-hook stands around ours, so nothing is mixed before it."""
    model = make_model("opt", dtype=torch.float64)
    inputs = inputs_for(model, (5, 3))
    config = ROUTED.__class__(**{**vars(ROUTED), "shift": ROUTED.shift.__class__(alpha=1.0)})
    out = model.model.decoder.layers[2].self_attn.out_proj
    found = []
    with torch.no_grad():
        for when in ("before", "after"):
            hook = out.register_forward_pre_hook(lambda module, args: (3 * args[0],)) if when == "before" else None
            handle = uk.patch(model, edits_for(model, config, prompts=inputs))
            hook = hook or out.register_forward_pre_hook(lambda module, args: (3 * args[0],))
            found.append(model(**inputs).logits)
            handle.remove()
            hook.remove()
    torch.testing.assert_close(*found)
