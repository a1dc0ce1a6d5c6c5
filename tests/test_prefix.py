"""The edited layers alone: the same logits and gradients as the full forward, and nothing below runs again."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import unike_kernels as uk
from tests.editing_tiny import make_processor, make_requests
from tests.models_tiny import ALWAYS, MODELS, ROUTED, edits_for, inputs_for, make_model, text_inputs
from unike_kernels.editing.inputs import Batch, Collator, Sample
from unike_kernels.editing.prefix import cases_named, head, recorded, run_prefix, run_tail, run_until
from unike_kernels.editing.train import GroupTrainer
from unike_kernels.models import find_decoder, get_module

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def batch_of(model, name, n=3, side="right"):
    requests = make_requests(name, n)
    samples = [Sample(r["prompt"], r["target"], r["image"]) for r in requests]
    return Collator(model, make_processor(name)).batch(samples, list(range(n)), side=side)


def by_tail(model, batch, first=1):
    decoder = find_decoder(model)
    prefix = run_prefix(model, decoder, batch, first)
    return head(model, decoder)(run_tail(model, decoder, prefix))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_full_forward(name, side):
    model = make_model(name)
    batch = batch_of(model, name, side=side)
    real = batch.inputs["attention_mask"].bool()
    full = model(**batch.inputs).logits[real]
    for first in range(len(find_decoder(model).layers)):
        torch.testing.assert_close(by_tail(model, batch, first)[real], full, **CLOSE)


@pytest.mark.parametrize("chosen", [None, [[0], [-1], [1]]], ids=["by itself", "chosen"])
@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_full_patched_forward(name, side, config, chosen):
    model, processor = make_model(name, dtype=torch.float64), make_processor(name)
    batch = batch_of(model, name, side=side)
    real = batch.inputs["attention_mask"].bool()
    decoder = find_decoder(model)
    prompts = [Sample(r["prompt"], None, r["image"]) for r in make_requests(name, 3)]
    asked = Collator(model, processor).batch(prompts, [0, 1, 2])
    prefix = run_prefix(model, decoder, batch, 1)
    base = model(**batch.inputs).logits
    with uk.patch(model, edits_for(model, config, prompts=asked.inputs)) as handle:
        handle.set_cases(batch.token_to_case(), batch.case_rows())
        if chosen is None:
            full = model(**batch.inputs).logits
        else:
            ids = [[handle.edits.ids[e] for e in row if e >= 0] for row in chosen]
            with handle.choosing(ids):
                full = model(**batch.inputs).logits
        assert (full - base)[real].abs().max() > 1e-2
        selected = None if chosen is None else torch.tensor(chosen)
        with cases_named(handle, batch, selected) as cases:
            tail = head(model, decoder)(run_tail(model, decoder, prefix))
            assert handle.record.runtime.tracker.current is cases and cases.state.layers.keys() == {1, 2, 3, 4}
        assert handle.record.runtime.tracker.current is None
    torch.testing.assert_close(tail[real], full[real], **CLOSE)


@torch.no_grad()
def test_layers_may_take_different_arguments():
    """A window in some layers only: every layer has its own mask, not the first edited layer's."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    config = Qwen2Config(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=3,
        initializer_range=0.25,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    model = Qwen2ForCausalLM(config).eval()
    inputs = text_inputs([9, 6], side="right")
    zeros = torch.zeros(2, 9, dtype=torch.bool)
    batch = Batch(model, inputs, torch.tensor([3, 3]), zeros, torch.tensor([8, 5]), [0, 1])
    real = inputs["attention_mask"].bool()
    full = model(**inputs).logits
    torch.testing.assert_close(by_tail(model, batch)[real], full[real], **CLOSE)
    model.config.layer_types[2] = "full_attention"
    assert (model(**inputs).logits - full)[real].abs().max() > 1e-3  # the window matters


def count_calls(model):
    decoder, calls, hooks = find_decoder(model), [], []
    for i in range(len(decoder.layers)):
        layer = get_module(model, decoder.layer_name(i))
        hooks.append(layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i)))
    return calls


def test_nothing_below_runs_again():
    model = make_model("blip2")
    decoder, batch = find_decoder(model), batch_of(model, "blip2")
    vision: list[str] = []
    model.vision_model.register_forward_hook(lambda *_: vision.append("vision"))
    calls = count_calls(model)
    prefix = run_prefix(model, decoder, batch, 3)
    assert calls == [0, 1, 2, 3] and vision == ["vision"]  # layer 3 ran once more, so that layer 4 is called
    for _ in range(2):
        run_tail(model, decoder, prefix)
    assert calls == [0, 1, 2, 3, 3, 4, 3, 4] and vision == ["vision"]
    assert not prefix.hidden.requires_grad


def test_run_until_stops_there_and_leaves_no_hook():
    model = make_model("llama")
    batch, decoder = batch_of(model, "llama"), find_decoder(model)
    calls = count_calls(model)
    run_until(batch, get_module(model, decoder.layers[2].ffn_input))
    assert calls == [0, 1, 2]
    model(**batch.inputs)
    assert calls == [0, 1, 2, 0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="did not run its Linear"):
        run_until(batch, nn.Linear(1, 1))
    bad = Batch(model, {"input_ids": torch.tensor([[99999]])}, *[torch.zeros(1)] * 3, [0])
    with pytest.raises(IndexError):
        run_prefix(model, decoder, bad, 2)
    with pytest.raises(ZeroDivisionError), recorded({0: model.model.layers[1]}, "input"):
        raise ZeroDivisionError
    for module in (model, *model.model.layers):
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_head_is_the_nearest():
    blip2 = make_model("blip2")
    assert head(blip2, find_decoder(blip2)) is blip2.language_model.lm_head
    llama = make_model("llama")
    del llama.lm_head
    with pytest.raises(ValueError, match="no lm_head around 'model' in LlamaForCausalLM"):
        head(llama, find_decoder(llama))


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("name", ["opt", "llama", "blip2", "llava"])
def test_training_by_tail_is_training_by_full_forward(name, independent):
    """The gradients of the neurons, and the loss, of both; the layers' shift is active."""
    model = make_model(name, dtype=torch.float64)
    model.requires_grad_(False)
    collator = Collator(model, make_processor(name))
    samples = [Sample(r["prompt"], r["target"], r["image"]) for r in make_requests(name, 3)]
    batch = collator.batch(samples, [0, 1, 2])
    edits = edits_for(model, prompts=inputs_for(model, [5, 4, 3]))
    with uk.patch(model, edits) as handle:
        zeros = dict.fromkeys(edits.layers, torch.zeros(16))
        trainer = GroupTrainer(
            collator, find_decoder(model), handle, edits.config.neurons, zeros, zeros, independent=independent
        )
        leaves = {
            (layer.index, kind): getattr(layer.neurons, kind).requires_grad_()
            for layer in handle.record.layers
            for kind in ("keys", "key_bias", "values")
        }
        loss, margin = trainer._forward(trainer._pass(samples, torch.arange(3)))
        tail = torch.autograd.grad(loss.sum(), list(leaves.values()))

        handle.set_cases(batch.token_to_case(), batch.case_rows())
        if independent:
            with handle.choosing(edits.ids):
                logits = model(**batch.inputs).logits
        else:
            logits = model(**batch.inputs).logits
        rows = []
        for row, labels in zip(logits, batch.labels(), strict=True):
            rows.append(nn.functional.cross_entropy(row[:-1], labels[1:], ignore_index=-100))
            at = labels[1:] != -100
            own = row[:-1][at].gather(1, labels[1:][at][:, None])[:, 0]
            others = row[:-1][at].scatter(1, labels[1:][at][:, None], -torch.inf).amax(dim=1)
            torch.testing.assert_close(margin[len(rows) - 1], (own - others).min(), **CLOSE)
        full = torch.autograd.grad(sum(rows), list(leaves.values()))
    torch.testing.assert_close(loss, torch.stack(rows), **CLOSE)
    for a, b, key in zip(tail, full, leaves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert max(g.abs().max() for g in tail) > 1e-3
