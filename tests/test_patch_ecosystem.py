"""A patch beside what else people put on a model: adapters, offloading, quantisation, compilation, checkpointing."""

import copy
import pickle
import warnings

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import unike_kernels as uk
from tests.models_tiny import (
    ALWAYS,
    ROUTED,
    edits_for,
    inputs_for,
    make_model,
    row_of,
    skip_where_models_do_not_compile,
    text_inputs,
)
from tests.test_patching import snapshot
from unike_kernels.caches import TRACES_FOLLOWERS, decisions_on
from unike_kernels.models import base_layer, find_decoder
from unike_kernels.projections import empty_like_site

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CONFIGS = pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


# --------------------------------------------------------------------------------------------------------------- peft

# Every projection that the shift calls, and both ends of the FFN.
TARGETS = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
}


def adapted(model, name, seed=0, adapter="default"):
    """`model` under a LoRA whose weights are not zero."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(adapter, config)
            return model.eval()
        return peft.get_peft_model(model, config, adapter_name=adapter).eval()


def merged_logits(name, edits, inputs, seed=0):
    """Logits of the edits on a plain model whose weights hold the adapter."""
    plain = adapted(make_model(name, dtype=torch.float64), name, seed).merge_and_unload()
    with pytest.warns(UserWarning, match="made on other weights"):
        uk.patch(plain, edits)
    return plain(**inputs).logits


@CONFIGS
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("order", ["adapter first", "patch first"])
def test_lora_before_and_after_a_patch(name, order, config):
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(adapted(copy.deepcopy(model), name), config, prompts={k: v[:2] for k, v in inputs.items()})
    edits.base = edits_for(model).base
    expected = merged_logits(name, edits, inputs)
    if order == "adapter first":
        model = adapted(model, name)
        base = model(**inputs).logits
        before = snapshot(model)
        handle = uk.patch(model, edits)
    else:
        handle = uk.patch(model, edits)
        model = adapted(model, name)
        handle.refresh()
        with handle.disabled():
            base = model(**inputs).logits
    edited = model(**inputs).logits
    torch.testing.assert_close(edited, expected, **CLOSE)
    assert (edited - base).abs().amax(dim=(1, 2))[:2].min() > 1e-2
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that saving the model does not save the edits
        assert not any("unike" in key for key in peft.get_peft_model_state_dict(model))
    assert len(uk.status(model)) == (9 if config is ROUTED else 8)
    uk.unpatch(model)
    assert torch.equal(model(**inputs).logits, base)
    assert order == "patch first" or snapshot(model) == before
    assert not any("unike" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("name", TARGETS)
def test_switched_and_merged_adapters_need_a_refresh(name):
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model)
    expected = {seed: merged_logits(name, edits, inputs, seed) for seed in (0, 1)}
    handle = uk.patch(model, edits)
    plain = model(**inputs).logits
    model = adapted(adapted(model, name, 0, "a"), name, 1, "b")
    for adapter, seed in (("b", 1), ("a", 0)):
        model.set_adapter(adapter)
        stale = model(**inputs).logits
        handle.refresh()
        torch.testing.assert_close(model(**inputs).logits, expected[seed], **CLOSE)
        assert (stale - expected[seed]).abs().max() > 1e-3  # the memory's keys and values were of other weights
    model.merge_adapter()
    handle.refresh()
    torch.testing.assert_close(model(**inputs).logits, expected[0], **CLOSE)
    model.unmerge_adapter()
    with model.disable_adapter():
        handle.refresh()
        torch.testing.assert_close(model(**inputs).logits, plain, **CLOSE)


@pytest.mark.parametrize("order", ["adapter first", "patch first"])
@pytest.mark.parametrize("name", TARGETS)
def test_patch_outlives_an_adapter(name, order):
    model = make_model(name)
    inputs = inputs_for(model, (5, 3))
    edits, base = edits_for(model), model(**inputs).logits
    with uk.patch(model, edits):
        expected = model(**inputs).logits
    if order == "adapter first":
        adapter = adapted(model, name)
        handle = uk.patch(adapter, edits)
    else:
        handle = uk.patch(model, edits)
        adapter = adapted(model, name)
    back = adapter.unload()
    handle.refresh()
    torch.testing.assert_close(back(**inputs).logits, expected)
    uk.unpatch(back)
    assert torch.equal(back(**inputs).logits, base)
    assert snapshot(back).keys() == snapshot(make_model(name)).keys()


def test_training_an_adapter_through_a_patch():
    model = adapted(make_model("llama"), "llama")
    inputs = inputs_for(model, (5, 3))
    with uk.patch(model, edits_for(model)):
        model(**inputs, labels=inputs["input_ids"].masked_fill(torch.arange(5) < 3, -100)).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values()) and len(grads) == 5 * 12
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_prefix_tuning_brings_a_used_cache():
    model = make_model("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model, config).eval()
    inputs = inputs_for(model, (5, 3))
    handle = uk.patch(model, edits_for(make_model("llama")))
    with pytest.raises(ValueError, match="ran without this patch"):
        model(**inputs)
    with handle.continuing("new"):
        model.generate(**inputs, **GREEDY)
        assert handle.record.runtime.tracker.current.decided


# --------------------------------------------------------------------------------------------------------- accelerate


def offloaded(model, how, folder):
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    parts = {"lm_head": "cpu", "model": "cpu"} if how == "one device" else {}
    if how == "disk":
        decoder = find_decoder(model).name
        parts = {n: "cpu" for n, _ in model.get_submodule(decoder).named_children()}
        parts = {f"{decoder}.{n}": where for n, where in parts.items() if n != "layers"}
        parts |= {f"{decoder}.layers.{i}": "disk" if i > 1 else "cpu" for i in range(5)} | {"lm_head": "cpu"}
    return accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


@CONFIGS
@pytest.mark.parametrize("order", ["offload first", "patch first"])
@pytest.mark.parametrize("how", ["cpu", "disk", "one device"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_offloading_before_and_after_a_patch(name, how, order, config, tmp_path):
    model = make_model(name)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
    with torch.no_grad():
        base = model(**inputs).logits
        with uk.patch(model, edits):
            expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        if order == "offload first":
            model = offloaded(model, how, tmp_path)
            before = snapshot(model)
            handle = uk.patch(model, edits)
        else:
            handle = uk.patch(model, edits)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # accelerate asks for a state_dict
                model = offloaded(model, how, tmp_path)
        if how != "one device":
            assert any(p.device.type == "meta" for p in model.parameters())
        assert {s.device for s in uk.status(model)} == {"cpu"}
        # Weights that are elsewhere leave the mix to be made behind the projection, which rounds otherwise (by 1.3e-5).
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1.3e-6, atol=3e-5)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
        with handle.disabled():
            torch.testing.assert_close(model(**inputs).logits, base)
        handle.swap(edits)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1.3e-6, atol=3e-5)
        uk.unpatch(model)
        if order == "offload first":
            assert {n: set(m) for n, m in snapshot(model).items()} == {n: set(m) for n, m in before.items()}
        assert not any("unike" in n for n, _ in model.named_modules())
        torch.testing.assert_close(model(**inputs).logits, base)


# ------------------------------------------------------------------------------------------------- quantised weights


class Int8Linear(nn.Module):
    """A linear map with int8 weights and no floating parameter but its bias, as quantisation libraries have them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_quantised_base(name, dtype, config):
    """As on a plain model with the dequantised weights; new tensors in the dtype that the model computes in."""
    model, plain = make_model(name, dtype=dtype), make_model(name, dtype=dtype)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in path:
            owner, _, child = path.rpartition(".")
            setattr(model.get_submodule(owner), child, Int8Linear(module))
            plain.get_submodule(path).weight.data = model.get_submodule(path).dequantised()
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(plain, config, prompts={k: v[:2] for k, v in inputs.items()}, dtype=dtype).to(dtype=torch.float32)
    base = model(**inputs).logits
    with uk.patch(plain, edits), warnings.catch_warnings():
        warnings.simplefilter("error")  # int8 weights give no probe to compare, and no false alarm
        expected = plain(**inputs).logits
        handle = uk.patch(model, edits)
    assert {s.dtype for s in uk.status(model) if s.kind != "router"} == {str(dtype).removeprefix("torch.")}
    edited = model(**inputs).logits
    assert (edited - base).abs().max() > 1e-2
    if dtype == torch.float32:  # in half precision, the roundings of a random model grow from layer to layer
        torch.testing.assert_close(edited, expected, **CLOSE)
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, base)


def test_where_a_site_computes():
    layer = nn.Module()
    layer.site = nn.Module()
    layer.site.packed = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    layer.site.eight = nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    layer.norm = nn.LayerNorm(2, dtype=torch.float16)
    assert empty_like_site(layer, "site").dtype == torch.float16  # 8-bit floats are storage, not arithmetic
    del layer.norm
    assert empty_like_site(layer, "site").dtype == torch.get_default_dtype()


# -------------------------------------------------------------------------------------------------------- compilation


class Counting:
    """A compiler backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "config"), [("opt", ALWAYS), ("llama", ROUTED), ("blip2", ROUTED)])
def test_compiled_model_follows_its_patch(name, config):
    skip_where_models_do_not_compile()
    model, backend = make_model(name, layers=3), Counting()
    inputs = inputs_for(model, (5, 3, 4))
    prompts = {k: v[:2] for k, v in inputs.items()}
    first, second = (edits_for(model, config, prompts=prompts, seed=seed, layers=(1, 2)) for seed in (0, 5))
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def check(graphs):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)
        assert graphs is None or backend.graphs == graphs
        return model(**inputs).logits

    base = check(1)
    handle = uk.patch(model, first)
    original = check(2)
    for edits in (second, first, second):  # no graph is made anew
        handle.swap(edits)
        swapped = check(2)
    assert not torch.equal(swapped, original) and not torch.equal(original, base)
    with handle.disabled():
        assert torch.equal(check(3), base)
    handle.refresh()
    assert torch.equal(check(3), swapped)
    handle.remove()
    assert torch.equal(check(3), base)
    uk.patch(model, second)
    assert torch.equal(check(None), swapped)  # not the edits of the graph made before
    uk.patch(model, first, name="another")
    check(None)
    uk.unpatch(model)
    assert torch.equal(check(None), base)


@CONFIGS
def test_compiled_decoding_with_a_static_cache(config):
    skip_where_models_do_not_compile()
    model = make_model("llama", layers=3)  # transformers' OPT itself does not compile with a static cache
    backend = Counting()
    inputs = inputs_for(model, (7, 6, 7))
    prompts = {k: v[:2] for k, v in inputs.items()}
    handle = uk.patch(model, edits_for(model, config, prompts=prompts, layers=(1, 2)))
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)

    def decode(step, row):
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = [model(**row_of(inputs, row), past_key_values=cache).logits[:, -1]]
        for token in (5, 6, 7):
            logits.append(step(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[:, -1])
        return torch.stack(logits), cache

    with torch.no_grad():
        for row in (0, 2):
            torch.testing.assert_close(decode(compiled, row)[0], decode(model, row)[0])
        made = backend.graphs
        _, cache = decode(compiled, 0)
        assert backend.graphs == made  # another sequence, the same graph
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        copied, of_copy = copy.deepcopy((model, cache))
        handle.swap(handle.edits)
        for stale in (cache, *copies, copy.deepcopy(copies[0])):
            with pytest.raises(Exception, match="before the edits of this patch changed"):
                compiled(input_ids=torch.tensor([[5]]), past_key_values=stale)
        assert copied(input_ids=torch.tensor([[5]]), past_key_values=of_copy).logits.isfinite().all()
        own = pickle.loads(pickle.dumps(copied))  # another process may have it without the first model
        uk.PatchHandle.of(own).swap(handle.edits)
        assert uk.PatchHandle.of(copied).record.runtime.tracker.version.live
        torch.testing.assert_close(decode(compiled, 0)[0], decode(model, 0)[0])
        _, cache = decode(compiled, 0)
        handle.remove()
        uk.patch(model, handle.edits)
        with pytest.raises(Exception, match="before the edits of this patch changed"):
            compiled(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_compiled_decoding_is_not_compiled_anew_where_another_model_moves():
    skip_where_models_do_not_compile()
    model, other, backend = make_model("llama", layers=3), make_model("opt", layers=3), Counting()
    inputs = inputs_for(model, (5, 3, 4))
    uk.patch(model, edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()}, layers=(1, 2)))
    uk.patch(other, edits_for(other, ALWAYS, layers=(1, 2)))
    compiled, token = torch.compile(model, backend=backend), torch.full((3, 1), 7)
    with torch.no_grad():
        for step in (model, model, compiled):  # by native code first
            cache = model(**inputs, use_cache=True).past_key_values
            for _ in range(2):
                step(input_ids=token, past_key_values=cache)
        made = backend.graphs
        for dtype in (torch.float64, torch.float32):
            other.to(dtype)
            cache = model(**inputs, use_cache=True).past_key_values
            compiled(input_ids=token, past_key_values=cache)
    assert backend.graphs == made > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_compiled_chunks_of_a_prompt_decide_as_eager_ones(side):
    """Right-padded prompts end in an earlier chunk than their batch: what that decided stays."""
    skip_where_models_do_not_compile()
    model = make_model("llama", layers=3, dtype=torch.float64)
    inputs = text_inputs((9, 5, 7), side=side)
    handle = uk.patch(model, edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()}, layers=(1, 2)))
    compiled, states = torch.compile(model, fullgraph=True, backend="eager"), []
    for run in (model, compiled):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), handle.continuing("new"):
            for start, end in ((0, 5), (5, 7), (7, 9)):
                mask = inputs["attention_mask"][:, :end]
                run(input_ids=inputs["input_ids"][:, start:end], attention_mask=mask, past_key_values=cache)
        states.append(decisions_on(cache, handle.record.name))
    assert torch.equal(states[0].selected, states[1].selected)
    for layer, decided in states[0].layers.items():
        torch.testing.assert_close(states[1].layers[layer].alpha, decided.alpha, **CLOSE)
        assert torch.equal(states[1].layers[layer].indices, decided.indices)


@pytest.mark.skipif(not TRACES_FOLLOWERS, reason="this torch's compiler cannot trace them")
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1], torch.tensor([True, False, True])], ids=["order", "list", "mask"])
def test_rows_of_a_cache_that_a_compiled_pass_filled_are_followed(rows):
    model = make_model("llama", layers=3, dtype=torch.float64)
    inputs = text_inputs((5, 5, 5))
    handle = uk.patch(model, edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()}, layers=(1, 2)))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        cache, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
        compiled(**inputs, past_key_values=cache)
        cache.batch_select_indices(rows)
        taken = {k: v[rows] for k, v in inputs.items()}
        model(**taken, past_key_values=alone)
        token = torch.full((len(taken["input_ids"]), 1), 7)
        said = [model(input_ids=token, past_key_values=c).logits for c in (cache, alone)]
    torch.testing.assert_close(*said, **CLOSE)
    assert len(set(map(tuple, handle.record.runtime.tracker.current.state.selected.tolist()))) > 1 or rows == [1, 1]


def test_gradients_of_a_compiled_model():
    skip_where_models_do_not_compile()
    model = make_model("opt", layers=2)
    inputs = inputs_for(model, (5, 3))
    with uk.patch(model, edits_for(model)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(**inputs, use_cache=False).logits.square().mean().backward()
            grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)


def test_layer_compiled_in_place_is_refused():
    model = make_model("llama")
    edits = edits_for(model)
    model.model.layers[2].compile()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 2 was compiled in place by .compile\(\): patch first"):
        uk.patch(model, edits)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------------ checkpointing


def gradients(model, handle, batches, edits):
    """Gradients of every base parameter, and of the neurons while they are trained, over several passes."""
    leaves = []
    for layer in handle.record.layers:
        for field in ("keys", "values"):
            leaf = getattr(edits.layers[layer.index], field).to(model.dtype).clone().requires_grad_()
            setattr(layer.neurons, field, leaf)
            leaves.append(leaf)
    model.zero_grad()
    loss = sum(model(**batch).logits.square().mean() for batch in batches)
    model(**batches[0])  # and a pass that nobody differentiates, before the backward
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None] + [leaf.grad for leaf in leaves]


@CONFIGS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant, config):
    """Also where other passes came between a forward and its backward, whose layers then run again."""
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3, 4))
    batches = [inputs, inputs_for(model, (6, 2, 4), seed=1), inputs]
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
    model.train()
    handle = uk.patch(model, edits)
    expected = gradients(model, handle, batches, edits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours = gradients(model, handle, batches, edits)
    assert len(ours) == len(expected) > 8
    for grad, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, wanted, **CLOSE)
    assert max(float(grad.abs().max()) for grad in ours[-8:]) > 1e-4


def test_base_layer_of_what_adapters_wrap():
    linear = nn.Linear(2, 2)
    once, twice = nn.Module(), nn.Module()
    once.base_layer, twice.base_layer = linear, once
    assert base_layer(linear) is base_layer(once) is base_layer(twice) is linear
