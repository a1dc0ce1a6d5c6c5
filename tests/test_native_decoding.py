"""Decoding on the CPU past torch's dispatcher: the same logits as with it, and only where nobody could tell."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

import unike_kernels as uk
from bench.tolerance import assert_close_to_reference
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model
from unike_kernels import cpu_kernels, native
from unike_kernels.modules import KnowledgeShift
from unike_kernels.neurons import ExtraNeurons

if native.cpu() is None:
    pytest.skip(f"no CPU module: {native.no_cpu()}", allow_module_level=True)

CONFIGS = {
    "always": ALWAYS,
    "routed": ROUTED,
    "causal": replace(ROUTED, shift=replace(ROUTED.shift, positions="from_case_token", orientation="input")),
}


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls that were made past the dispatcher, and how each ended."""
    made = []
    for module, name in ((ExtraNeurons, "add_natively"), (KnowledgeShift, "mix_natively")):
        real = getattr(module, name)

        def call(*args, real=real, name=name):
            result = real(*args)
            made.append((name, result is not False and result is not None))
            return result

        monkeypatch.setattr(module, name, call)
    return made


def patched(name, config=ROUTED, dtype=torch.float32, rows=(5, 3), **options):
    model = make_model(name, dtype=dtype)
    inputs = inputs_for(model, rows, side="left")
    return model, inputs, uk.patch(model, edits_for(model, config, prompts=inputs), **options)


def decode(model, inputs, steps=3, cache=None, masked=True):
    """Logits of greedy steps after a prefill."""
    text = model.get_submodule("language_model") if hasattr(model, "qformer") else model
    out = model(**inputs, use_cache=True, **({} if cache is None else {"past_key_values": cache}))
    cache = getattr(out, "past_key_values", None) or out.language_model_outputs.past_key_values
    logits, mask = [], inputs["attention_mask"]
    if hasattr(model, "qformer"):
        mask = torch.cat([torch.ones(len(mask), cache.get_seq_length() - mask.shape[1], dtype=mask.dtype), mask], 1)
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = torch.full((len(mask), 1), 5 + step)
        more = {"attention_mask": mask} if masked else {}
        logits.append(text(input_ids=token, past_key_values=cache, use_cache=True, **more).logits)
    return torch.stack(logits)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "olmo2"])
def test_it_says_what_the_operators_say(name, config, mode, calls, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs, handle = patched(name, CONFIGS[config], dtype)
        calls.clear()
        with mode():
            found = decode(model, inputs)
            sites = len(handle.record.layers)
            assert calls == [("mix_natively", True), ("add_natively", True)] * 3 * sites
            with monkeypatch.context() as patch:
                patch.setattr(cpu_kernels, "unwatched", lambda: False)
                by_dispatcher = decode(model, inputs)
            assert len(calls) == 6 * sites
            handle.record.runtime.tracker.renew()
            with handle.disabled():
                base = decode(model, inputs)
        assert torch.equal(found, by_dispatcher)  # the same native code, reached another way
        assert (found - base).abs().amax(dim=(0, 2, 3)).min() > 1e-3
        uk.unpatch(model)
        uk.patch(model, handle.record.edits, backend="reference")
        with mode():
            plain = decode(model, inputs)
        if dtype == torch.float32:
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
            continue
        with mode():  # bfloat16 rounds both by as much as they differ: the truth is float64's
            truth = decode(model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
        assert_close_to_reference(found, truth, plain, 2)


def test_gradients_modes_profilers_and_other_dtypes_go_by_the_dispatcher(calls):
    model, inputs, handle = patched("llama")
    with torch.no_grad():
        expected = decode(model, inputs)
    assert len(calls) > 0

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    for context in (FlopCounterMode(display=False), torch.autograd.profiler.profile(), Watching()):
        calls.clear()
        with torch.no_grad(), context:
            torch.testing.assert_close(decode(model, inputs), expected)
        assert calls == []
    torch.testing.assert_close(decode(model, inputs), expected, rtol=1e-4, atol=1e-4)  # with gradients: the reference
    assert calls == []
    for options in ({"dtype": torch.float64}, {"backend": "reference"}):
        model, inputs, handle = patched("llama", **options)
        with torch.no_grad():
            decode(model, inputs)
        assert not any(done for _, done in calls)
        calls.clear()
    model, inputs, handle = patched("llama", rows=(2,) * 17)
    with torch.no_grad():
        decode(model, inputs)
    assert calls == []


def test_a_profile_names_the_operators():
    model, inputs, handle = patched("opt")
    with torch.no_grad(), torch.profiler.profile() as profile:
        decode(model, inputs)
    assert {"unike::extra_neurons_", "unike::knowledge_shift"} <= {event.key for event in profile.key_averages()}


def test_a_query_that_was_written_to_is_computed_anew(calls):
    model, inputs, handle = patched("opt")
    with torch.no_grad():
        expected = decode(model, inputs)
        layer = handle.record.layers[0].sites.q_proj
        at = model.model.decoder.get_submodule(layer)
        scale = at.register_forward_hook(lambda module, args, output: output.mul_(1.0))
        calls.clear()
        found = decode(model, inputs)
        scale.remove()
    torch.testing.assert_close(found, expected)
    assert len(calls) == 3 * (2 * len(handle.record.layers) - 1)  # that layer's shift went by the operator


def test_an_output_that_others_may_have_kept_is_not_written_to(calls):
    model, inputs, handle = patched("opt")
    kept = []
    last = model.model.decoder.get_submodule(handle.record.layers[0].sites.ffn_output)
    seen = last.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())), prepend=True)
    with torch.no_grad():
        decode(model, inputs)
    seen.remove()
    assert kept and all(torch.equal(output, before) for output, before in kept)


def test_nothing_selected_keeps_every_bit_and_a_mask_names_no_case():
    model, inputs, handle = patched("opt", rows=(5, 3, 4))
    with torch.no_grad():
        with handle.disabled():
            base = decode(model, inputs)
        with handle.choosing([handle.record.edits.ids[0], None, None]):
            some = decode(model, inputs)
            unmasked = decode(model, inputs, masked=False)
    assert torch.equal(some[:, 1:], base[:, 1:]) and not torch.equal(some[:, 0], base[:, 0])
    assert unmasked.shape == base.shape


@pytest.mark.parametrize("how", ["swap", "deepcopy", "pickle", "static cache", "to half and back"])
def test_it_follows_what_becomes_of_the_model(how, calls, monkeypatch):
    model, inputs, handle = patched("llama")
    with torch.no_grad():
        before = decode(model, inputs)
        if how == "swap":
            handle.swap(replace_values(handle.record.edits))
            assert not torch.allclose(decode(model, inputs), before)
        elif how == "deepcopy":
            model = copy.deepcopy(model)
        elif how == "pickle":
            model = pickle.loads(pickle.dumps(model))
        elif how == "to half and back":
            model.half()
            decode(model, inputs)
            model.float()

        def again():
            cache = StaticCache(config=model.config, max_cache_len=32) if how == "static cache" else None
            return decode(model, inputs, cache=cache)

        calls.clear()
        found = again()
        assert calls and all(done for _, done in calls)
        monkeypatch.setattr(cpu_kernels, "unwatched", lambda: False)
        assert torch.equal(found, again())
    if how in ("deepcopy", "pickle"):
        assert torch.equal(found, before)


def test_steps_follow_a_model_that_goes_to_shared_memory_while_it_decodes(calls):
    model, inputs, _ = patched("llama", rows=(5, 3, 4))
    said = []
    with torch.no_grad():
        for shared in (False, True):
            cache = model(**inputs, use_cache=True).past_key_values
            logits = []
            for step in range(4):
                if shared and step == 2:
                    model.share_memory()  # as torch.multiprocessing does: the storage stays, its bytes lie elsewhere
                logits.append(model(input_ids=torch.full((3, 1), 7), past_key_values=cache).logits)
            said.append(torch.stack(logits))
    assert torch.equal(*said) and calls and all(done for _, done in calls)


def replace_values(edits):
    layers = {i: replace(layer, values=-layer.values) for i, layer in edits.layers.items()}
    return replace(edits, layers=layers)


def test_generate_says_the_same(calls, monkeypatch):
    model, inputs, handle = patched("blip2")
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(**inputs, **greedy)
    assert any(done for _, done in calls)
    monkeypatch.setattr(cpu_kernels, "unwatched", lambda: False)
    assert torch.equal(model.generate(**inputs, **greedy), found)


def test_steps_follow_buffers_that_are_put_in_the_place_of_others(calls):
    """A prepared step reads what stands in the module now, in the middle of an answer too."""
    model, inputs, handle = patched("opt")
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        cache, token = out.past_key_values, torch.full((2, 1), 5)

        def step():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        before = step()
        assert torch.equal(step(), before)
        for layer in handle.record.layers:
            layer.neurons.values = -layer.neurons.values
            layer.shift.memory.values = -layer.shift.memory.values
        calls.clear()
        after = step()
        assert calls and all(done for _, done in calls) and not torch.allclose(after, before)
        for layer in handle.record.layers:
            layer.neurons.values = layer.neurons.values.double()  # native code takes one dtype
        calls.clear()
        torch.testing.assert_close(step(), after)
        assert [done for name, done in calls if name == "add_natively"] == [False] * len(handle.record.layers)


@pytest.mark.parametrize("table", ["keys", "values"])
def test_steps_follow_a_memory_that_is_written_to(table, calls, monkeypatch):
    """A prepared shift reads a copy of its items, but only of the memory as it is."""
    model, inputs, handle = patched("llama")
    with torch.inference_mode():
        cache, token = model(**inputs, use_cache=True).past_key_values, torch.full((2, 1), 5)

        def step():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        before = step()
        for layer in handle.record.layers:
            getattr(layer.shift.memory, table).mul_(-2)
        after = step()
        assert not torch.allclose(after, before) and all(done for _, done in calls)
        monkeypatch.setattr(cpu_kernels, "MOST_GATHERED_BYTES", 0)
        handle.record.runtime.tracker.step.steps.clear()
        assert torch.equal(step(), after)


def test_two_sequences_that_decode_in_turn_and_padding_in_a_step(calls, monkeypatch):
    model, inputs, handle = patched("llama")
    with torch.no_grad():
        caches = [model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        with handle.choosing([handle.edits.ids[0], None]):
            caches.append(model(**inputs, use_cache=True).past_key_values)

        def steps():
            found = []
            for cache in (*caches, *caches):
                mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
                mask[1, -1] = 0  # the second row has no token in this step
                for given in ({}, {"attention_mask": mask}):
                    token = torch.full((2, 1), 6)
                    found.append(model(input_ids=token, past_key_values=cache, use_cache=True, **given).logits)
                    cache.crop(-1)
            return torch.stack(found)

        found = steps()
        assert calls and all(done for _, done in calls)
        monkeypatch.setattr(cpu_kernels, "unwatched", lambda: False)
        assert torch.equal(found, steps())
