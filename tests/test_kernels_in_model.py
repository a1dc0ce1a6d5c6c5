"""Whole models and the editor through the Triton kernels, beside the same through the reference."""

from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from bench.quality import world
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from tests.editing_tiny import make_editor, make_requests, routed
from tests.kernel_tools import launches
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model, skip_where_models_do_not_compile
from unike_kernels.config import RoutingConfig, UnikeConfig
from unike_kernels.editing.inputs import Sample
from unike_kernels.triton_kernels import MAX_K


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_edit_trained_through_the_kernels(name):
    """Neurons alone: their forward and backward kernels in every step of the training."""
    config = routed()
    config = replace(
        config, shift=replace(config.shift, enabled=False), neurons=replace(config.neurons, steps=2, margin=1e9)
    )
    editor = make_editor(name, config)
    requests = make_requests(name)[:1]
    made = {}
    for backend in ("reference", "triton"):
        editor.backend = backend
        with launches() as started, pytest.warns(UserWarning):
            made[backend] = editor.edit(requests, progress=False)
        assert bool(started) == (backend == "triton")
    (ours,), (theirs,) = made["triton"].entries, made["reference"].entries
    assert ours.steps == theirs.steps == 2
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    for layer, own in made["triton"].layers.items():
        torch.testing.assert_close(own.values, made["reference"].layers[layer].values, rtol=1e-2, atol=1e-4)


def test_editor_refuses_an_unknown_backend():
    editor = make_editor("opt")
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'triton', .*'reference', but got 'magic'"):
        uk.Editor(editor.model, editor.collator.processor, backend="magic")


@pytest.mark.parametrize(("name", "config"), [("opt", ALWAYS), ("llama", ROUTED)], ids=["always", "routed"])
def test_inductor_compiles_a_patched_model_in_one_graph(name, config):
    skip_where_models_do_not_compile()
    torch._dynamo.reset()
    model = make_model(name, layers=2)
    inputs = inputs_for(model, (5, 3, 4))
    prompts = {k: v[:2] for k, v in inputs.items()}
    handle = uk.patch(model, edits_for(model, config, prompts=prompts, layers=(1,)))
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    with torch.no_grad():
        logits = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        with handle.disabled():
            base = model(**inputs, use_cache=False).logits
    assert (logits - base).abs().amax(dim=(1, 2))[:2].min() > 1e-2


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
def test_compiled_model_runs_the_kernels(config):
    skip_where_models_do_not_compile()
    torch._dynamo.reset()
    model = make_model("llama", layers=2)
    inputs = inputs_for(model, (5, 3, 4))
    prompts = {k: v[:2] for k, v in inputs.items()}
    config = replace(config, shift=replace(config.shift, enabled=False))
    edits = edits_for(model, config, prompts=prompts, layers=(1,))
    with torch.no_grad():
        with uk.patch(model, edits, backend="reference"):
            expected = model(**inputs, use_cache=False).logits
        uk.patch(model, edits, backend="triton")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with launches() as started:
            logits = compiled(**inputs, use_cache=False).logits
    assert started
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def demo():
    """The trained emoji model with two routed edits, and questions: edited, rephrased, another drawing, unrelated."""
    model, processor = emoji.load(0)
    config = UnikeConfig(routing=RoutingConfig(mode="routed"))
    editor = uk.Editor(model, processor, config, backend="reference")
    editor.build_memory(world.triplets(60), progress=False)
    editor.fit()
    items = records.records("development", "name", 2)
    edits = editor.edit([world.request(r) for r in items], progress=False)
    samples = []
    for r in items:
        picture = world.picture(r["image"])
        samples += [Sample(r["src"], r["alt"], picture), Sample(r["rephrase"], r["alt"], picture)]
        samples.append(Sample(r["src"], r["alt"], world.picture(r["image_rephrase"])))
        samples += [Sample(r["m_loc_q"], r["m_loc_a"], world.picture(r["m_loc"])), Sample(r["loc"], r["loc_ans"])]
    return editor, edits, samples


def test_generate_says_the_same_with_the_kernels(demo):
    editor, edits, samples = demo
    said = {"base": editor.collator.generate(samples, max_new_tokens=3)}
    for backend in ("reference", "triton"):
        with uk.patch(editor.model, edits, routing="routed", backend=backend), launches() as started:
            said[backend] = editor.collator.generate(samples, max_new_tokens=3)
        assert (backend == "triton") == bool(started)
    assert said["triton"] == said["reference"] != said["base"]


@pytest.mark.parametrize(("attention", "alpha"), [("projected", None), ("projected", 0.3), ("raw", None)])
@pytest.mark.parametrize("base", [ALWAYS, ROUTED], ids=["always", "routed"])
def test_tokens_that_retrieve_by_themselves(base, attention, alpha):
    """A prompt, then a step that decodes, in which one row is padding: the search and the shift in one operator."""
    config = replace(base, shift=replace(base.shift, per="token", attention=attention, alpha=alpha))
    model = make_model("llama", layers=2)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()}, layers=(1,))
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [1], [0]])], dim=1)
    token, found = torch.full((3, 1), 7), {}
    for backend in ("reference", "triton"):
        with torch.no_grad(), uk.patch(model, edits, backend=backend), launches() as started:
            first = model(**inputs, use_cache=True)
            step = model(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values)
            found[backend] = first.logits, step.logits
        shift = "project" if attention == "projected" and alpha is None else "attend"
        assert started[f"knowledge_shift_{shift}"] == (2 if backend == "triton" else 0)
        assert not started["cosine_topk_merge"] or base is ROUTED  # by the router
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_tokens_of_a_case_with_more_edits_than_one_operator_takes(alpha):
    """Then they search first, as a prompt's tokens do."""
    model, config = (
        make_model("llama", layers=2),
        replace(ROUTED, shift=replace(ROUTED.shift, per="token", alpha=alpha)),
    )
    row, edits = inputs_for(model, (3,)), edits_for(model, config, n_edits=MAX_K + 1, neurons=0, layers=(1,))
    with torch.no_grad():
        found = {"base": model(**row, use_cache=False).logits}
        for backend in ("reference", "triton"):
            with uk.patch(model, edits, backend=backend) as handle, handle.choosing([edits.ids]), launches() as started:
                found[backend] = model(**row, use_cache=False).logits
            assert bool(started["cosine_topk_merge"]) == (backend == "triton")
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-5)
    assert (found["triton"] - found["base"]).abs().max() > 1e-3
