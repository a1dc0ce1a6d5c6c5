"""Passes of tiny patched models, and what was decided in them, for the tests of cases."""

from dataclasses import replace

import torch
from transformers import DynamicCache

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model

CONFIGS = {
    "always": ALWAYS,
    "routed": ROUTED,
    "causal": replace(ROUTED, shift=replace(ROUTED.shift, positions="from_case_token")),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # LLaMA's norms and rotations compute in float32 whatever the model's dtype


def patched(name, config, rows=(7, 4, 6), *, edited=2, dtype=torch.float64, side="left", **options):
    """A patched model and a batch, its first `edited` rows questions of edits, so that routing tells rows apart."""
    model = make_model(name, dtype=dtype)
    inputs = inputs_for(model, rows, side=side)
    questions = {key: tensor[:edited] for key, tensor in inputs.items()}
    handle = uk.patch(model, edits_for(model, config, prompts=questions), **options)
    return model, inputs, handle


def decisions(handle):
    """{layer: (indices, alpha)} of the pass that just ran, and the edits selected."""
    state = handle.record.runtime.tracker.current.state
    return {i: (d.indices, d.alpha) for i, d in state.layers.items()}, state.selected


def assert_same_decisions(ours, theirs):
    (layers, selected), (other_layers, other_selected) = ours, theirs
    assert layers.keys() == other_layers.keys() and layers
    for i in layers:
        assert torch.equal(layers[i][0], other_layers[i][0])
        torch.testing.assert_close(layers[i][1], other_layers[i][1], **CLOSE)
    assert (selected is None) == (other_selected is None)
    assert selected is None or torch.equal(selected, other_selected)


def rows_of_decisions(found, rows):
    layers, selected = found
    return {i: (d[rows], a[rows]) for i, (d, a) in layers.items()}, None if selected is None else selected[rows]


def steps(model, inputs, cache=None, n=4):
    """Logits of a prefill and of n - 1 greedy steps with a KV cache, one generator step each."""
    cache = DynamicCache() if cache is None else cache
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for _ in range(n):
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **rest)
        yield out.logits[:, -1]
        ids, rest = out.logits[:, -1:].argmax(-1), {}
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
