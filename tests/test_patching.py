"""patch, unpatch, status and the handle: what changes on a model, and that all of it can be taken back."""

import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import unike_kernels as uk
from tests.models_tiny import ALWAYS, MODELS, ROUTED, edits_for, inputs_for, make_model
from tests.sites_expected import Recording, cases_of, expected_attention
from unike_kernels import attaching
from unike_kernels.config import UnikeConfig
from unike_kernels.models import Decoder, find_decoder, get_module


def snapshot(model):
    """All that a patch could leave behind: every attribute of every module, by identity, dicts by their entries."""
    return {
        name: {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


def tensors(handle):
    """Copies of all tensors that a patch put on its model."""
    parts = [m for layer in handle.record.layers for m in (layer.neurons, layer.shift, layer.router) if m is not None]
    return [tensor.clone() for part in parts for tensor in part.buffers()]


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("name", MODELS)
def test_edits_act_and_leave_no_trace(name, config):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    base = model(**inputs).logits  # transformers keeps some things at a first call
    before, keys, edits = snapshot(model), list(model.state_dict()), edits_for(model, config, prompts=inputs)
    handle = uk.patch(model, edits)
    edited = model(**inputs).logits
    assert (edited - base).abs().amax(dim=(1, 2)).min() > 1e-2
    with handle.disabled():
        assert torch.equal(model(**inputs).logits, base)
        with handle.disabled():
            pass
        assert torch.equal(model(**inputs).logits, base)
    assert torch.equal(model(**inputs).logits, edited)
    with pytest.warns(UserWarning, match="save_pretrained"):
        assert list(model.state_dict()) == keys
    uk.unpatch(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, base)
    assert not uk.status(model)
    uk.unpatch(model)  # a clean model: nothing to do
    handle.remove()
    assert snapshot(model) == before


def test_with_undoes_on_an_exception():
    model = make_model("opt")
    before = snapshot(model)
    with pytest.raises(KeyError, match="mine"), uk.patch(model, edits_for(model)):
        assert uk.status(model)
        raise KeyError("mine")
    assert snapshot(model) == before


def test_default_layers_are_the_edits_own_and_any_of_them_can_be_chosen():
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    edits = edits_for(model)
    with uk.patch(model, edits) as handle:
        assert [layer.index for layer in handle.record.layers] == [1, 2, 3, 4]  # the last four of five
        everything = model(**inputs).logits
    few = edits_for(model, layers=(0, 3))
    with uk.patch(model, few) as handle:
        assert [layer.index for layer in handle.record.layers] == [0, 3]
    with uk.patch(model, edits, layers=[4, 2]) as handle:
        assert [layer.index for layer in handle.record.layers] == [2, 4]
        some = model(**inputs).logits
    assert not torch.equal(some, everything)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_base_changes(training):
    model = make_model("llama").train(training)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = [(name, id(p), p.requires_grad, p.dtype, p.clone()) for name, p in model.named_parameters()]
    handle = uk.patch(model, edits_for(model, ROUTED))
    added = [m for layer in handle.record.layers for m in (layer.neurons, layer.shift, layer.router) if m is not None]
    assert all(module.training is training for module in added)
    assert not [p for module in added for p in module.parameters()]
    model(**inputs_for(model, [5, 3])).logits.sum().backward()
    for (name, identity, grad, dtype, value), (now, p) in zip(before, model.named_parameters(), strict=True):
        assert (name, identity, grad, dtype) == (now, id(p), p.requires_grad, p.dtype) and torch.equal(value, p)
    model.train(not training)
    assert all(module.training is not training for module in added)


def test_no_global_state():
    from transformers.models.llama import modeling_llama
    from transformers.models.opt import modeling_opt

    owners = [modeling_opt, modeling_llama, torch, torch.nn, torch.nn.functional, torch.nn.modules.module]
    owners += [modeling_opt.OPTDecoderLayer, modeling_llama.LlamaMLP, modeling_llama.LlamaAttention]
    owners += [nn.Module, nn.Linear, nn.ModuleDict, sys.modules["transformers"]]
    for name in ("opt", "llama"):
        model, other = make_model(name), make_model(name)
        inputs = inputs_for(model, [5, 3])
        edits, base, untouched = edits_for(model), other(**inputs).logits, snapshot(other)
        model(**inputs)
        before = [dict(vars(owner)) for owner in owners]
        hooks = {k: len(v) for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global") and v}
        handle = uk.patch(model, edits)
        model(**inputs)
        assert [dict(vars(owner)) for owner in owners] == before
        assert hooks == {k: len(v) for k, v in vars(torch.nn.modules.module).items() if k.startswith("_global") and v}
        assert torch.equal(other(**inputs).logits, base) and snapshot(other) == untouched
        handle.remove()


def test_hooks_of_others_stay():
    model = make_model("opt")
    inputs, edits = inputs_for(model, [5, 3]), edits_for(model)
    calls = []
    for module in (model.model.decoder, model.model.decoder.layers[3].fc2, model.model.decoder.layers[3].self_attn):
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    before = snapshot(model)
    with uk.patch(model, edits):
        model(**inputs)
    assert len(calls) == 3 and snapshot(model) == before
    model(**inputs)
    assert len(calls) == 6


# --------------------------------------------------------------------------------------------------------- refusals


def cut_keys(edits):
    edits.layers[2].keys = edits.layers[2].keys[:, :-1]


def whole_keys(edits):
    edits.layers[2].keys = edits.layers[2].keys.long()


def nan_keys(edits):
    edits.layers[2].keys[0, 0] = float("nan")


def many_items(edits):
    edits.config = replace(edits.config, shift=replace(edits.config.shift, k=129))


def uncalibrated(edits):
    edits.calibration = None


REFUSED = {
    "name": ({"name": "my edits"}, "must be usable as a module's name"),
    "name of a method": ({"name": "keys"}, "must be usable as a module's name"),
    "name twice": ({"name": "there"}, r"a patch named 'there' is already on this model \(patches: there\)"),
    "backend": ({"backend": "magic"}, "backend must be one of .*, but got 'magic'"),
    "items of triton": ({"change": many_items, "backend": "triton"}, "at most 128 items, but these edits ask for 129"),
    "mode": ({"mode": "melt"}, "mode must be .*, but got 'melt'"),
    "routing": ({"routing": "maybe"}, "routing must be 'edits', 'always' or 'routed', but got 'maybe'"),
    "no calibration": ({"change": uncalibrated, "routing": "routed"}, "these have no calibration"),
    "calibrated elsewhere": (
        {"routing": "routed", "layers": [2, 3]},
        "calibrated at layer 1, but the first edited layer here is 2",
    ),
    "no layers": ({"layers": []}, r"some of the edits' layers \[1, 2, 3, 4\], but got \[\]"),
    "layer of no edit": ({"layers": [0, 1]}, r"some of the edits' layers \[1, 2, 3, 4\], but got \[0, 1\]"),
    "layer that is not there": ({"layers": [99]}, r"but got \[99\]"),
    "too few groups": ({"max_groups": 2}, r"room for 2 edits \(max_groups at patch time\), but got 3"),
    "too few neurons": ({"max_neurons": 5}, r"room for 5 neurons \(max_neurons at patch time\), but got 6"),
    "too few items": ({"max_items": 8}, r"room for 8 items \(max_items at patch time\), but got 9"),
    "negative": ({"max_items": -1}, "max_items must be a whole number from 0, or None, but got -1"),
    "not whole": ({"max_groups": 2.5}, "max_groups must be a whole number from 0, or None, but got 2.5"),
    "shapes": ({"change": cut_keys}, r"layers.2.keys has shape \[6, 15\], but must have \[6, 16\]"),
    "dtype": ({"change": whole_keys}, "layers.2.keys has dtype torch.int64"),
    "not finite": ({"change": nan_keys}, "layers.2.keys holds values that are not finite"),
}


@pytest.mark.parametrize("model_name", ["opt", "llama"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_call_changes_nothing(what, model_name):
    options, message = REFUSED[what]
    options, model = dict(options), make_model(model_name)
    edits = edits_for(model)
    uk.patch(model, edits, name="there")
    if "change" in options:
        options.pop("change")(edits)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        uk.patch(model, edits, **options)
    assert snapshot(model) == before


def test_edits_of_another_architecture_are_refused_naming_both():
    llama, opt = make_model("llama"), make_model("opt")
    before = snapshot(llama)
    with pytest.raises(ValueError, match="family: 'opt' and 'llama'; gated: False and True; act: 'relu' and 'silu'"):
        uk.patch(llama, edits_for(opt))
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}
    other = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=5, num_key_value_heads=4))
    with pytest.raises(ValueError, match="ffn_size: 20 and 24; kv_heads: 4 and 2"):
        uk.patch(llama, edits_for(other))
    shallow = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=4))
    with pytest.raises(ValueError, match="num_layers: 5 and 4"):
        uk.patch(shallow, edits_for(other))
    assert snapshot(llama) == before


def test_other_weights_only_warn():
    model = make_model("llama")
    edits = edits_for(model)
    with pytest.warns(UserWarning, match="made on other weights"), uk.patch(make_model("llama", seed=1), edits):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float16, torch.float64):  # one checkpoint in other precisions
            uk.patch(make_model("llama", dtype=dtype), edits).remove()


def test_what_is_no_model_and_no_edits():
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"Edits.from_pretrained loads them\), but got str"):
        uk.patch(model, "edits/")
    with pytest.raises(TypeError, match="model must be an nn.Module, but got dict"):
        uk.patch({}, edits_for(model))
    assert snapshot(model) == before


def test_unknown_family_says_what_to_do():
    strange = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    before = snapshot(strange)
    with pytest.raises(uk.UnsupportedModelError, match="Known families: llama, opt. Name the sites by hand"):
        uk.patch(strange, edits_for(make_model("llama")))
    assert snapshot(strange) == before
    two = nn.ModuleDict({"a": make_model("llama"), "b": make_model("llama")})
    with pytest.raises(uk.UnsupportedModelError, match=r"several decoders \(a.model, b.model\)"):
        uk.patch(two, edits_for(make_model("llama")))


def test_model_on_the_meta_device_is_refused():
    edits = edits_for(make_model("opt"))
    model = make_model("opt").to("meta")
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers.1.self_attn is on the meta device"):
        uk.patch(model, edits)
    assert snapshot(model) == before


def test_sites_named_by_hand():
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    edits = edits_for(model)
    with uk.patch(model, edits):
        expected = model(**inputs).logits
    found = find_decoder(model)
    with uk.patch(model, edits, sites=found):
        assert torch.equal(model(**inputs).logits, expected)
    before = snapshot(model)
    astray = tuple(replace(sites, k_proj=sites.k_proj + "x") for sites in found.layers)
    with pytest.raises(uk.UnsupportedModelError, match="no module 'layers.1.self_attn.k_projx'"):
        uk.patch(model, edits, sites=Decoder("llama", found.name, astray))
    outside = tuple(replace(sites, ffn_output="lm_head") for sites in found.layers)
    with pytest.raises(ValueError, match="sites must lie inside their decoder 'model', but got lm_head"):
        uk.patch(model, edits, sites=Decoder("llama", found.name, outside))
    with pytest.raises(uk.UnsupportedModelError, match="no module 'nowhere'"):
        uk.patch(model, edits, sites=Decoder("llama", "nowhere", found.layers))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("part", "at"),
    [("AttentionHook", 0), ("AttentionHook", 3), ("FfnOutputHook", 2), ("LabelsHook", 0), ("SaveWarning", 0)],
)
@pytest.mark.parametrize("others", [False, True], ids=["clean", "patched"])
@pytest.mark.parametrize("name", ["blip2", "llama"])
def test_failure_in_the_middle_is_undone(name, others, part, at, monkeypatch):
    model = make_model(name)
    if others:
        uk.patch(model, edits_for(model), name="there")
    edits, before, real, calls = edits_for(model, ROUTED), snapshot(model), getattr(attaching, part), []

    def failing(*args):
        calls.append(args)
        if len(calls) > at:
            raise MemoryError("injected")
        return real(*args)

    monkeypatch.setattr(attaching, part, failing)
    with pytest.raises(MemoryError, match="injected"):
        uk.patch(model, edits)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------------------- status


def test_status_says_what_sits_where():
    model = make_model("blip2")
    assert str(uk.status(model)) == "no edits on this model"
    edits = edits_for(model, ROUTED, layers=(1, 3), neurons=[[2, 1], [0, 1], [3, 0]])
    handle = uk.patch(model, edits, max_items=20)
    found = uk.status(model)
    where = "language_model.model.decoder.layers.1"
    assert [(s.module, s.kind, s.rows) for s in found[:3]] == [
        (f"{where}.self_attn", "router", 3),
        (f"{where}.self_attn", "shift", 20),
        (f"{where}.fc2", "neurons", 5),
    ]
    assert {(s.name, s.enabled, s.edits, s.dtype, s.device) for s in found} == {("default", True, 3, "float32", "cpu")}
    assert found[2].bytes == 4 * (5 * 16 + 5 + 5 * 16) + 8 * 4
    for s in found:
        assert "unike" in dict(get_module(model, s.module).named_children())
    with handle.disabled():
        lines = str(uk.status(model)).splitlines()
    assert lines[0].split() == ["name", "module", "kind", "on", "edits", "rows", "dtype", "device", "bytes"]
    assert lines[1].split()[:4] == ["default", f"{where}.self_attn", "router", "no"]


# ------------------------------------------------------------------------------------------------------ two patches


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("removed", ["one", "two"])
def test_removal_of_one_patch_leaves_the_other_exact(name, removed):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    edits = {"one": edits_for(model, ROUTED, prompts=inputs), "two": edits_for(model, seed=5)}
    alone = {}
    for which in edits:
        with uk.patch(model, edits[which], name=which):
            alone[which] = model(**inputs).logits
    handles = {which: uk.patch(model, edits[which], name=which) for which in edits}
    both = model(**inputs).logits
    assert not any(torch.equal(both, logits) for logits in alone.values())
    assert [s.name for s in uk.status(model)] == ["one"] * 9 + ["two"] * 8
    other = {"one": "two", "two": "one"}[removed]
    with handles[removed].disabled():
        assert torch.equal(model(**inputs).logits, alone[other])
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 8)
    handles[removed].remove()
    assert torch.equal(model(**inputs).logits, alone[other])
    uk.unpatch(model)
    assert not uk.status(model)


def test_a_later_patch_sees_what_an_earlier_one_did():
    model = make_model("llama", dtype=torch.float64)
    inputs = inputs_for(model, [5, 3])
    first, second = edits_for(model, layers=(2,)), edits_for(model, layers=(2,), seed=5, shared_seed=5)
    sites = find_decoder(model).layers[2]
    attention = get_module(model, sites.attention)
    with torch.no_grad(), uk.patch(model, first, name="first"), uk.patch(model, second, name="second"):
        with Recording(model, (2,)) as recording:
            model(**inputs)
        seen, rows = recording.seen, cases_of(inputs)
        once = expected_attention(attention, sites, first, 2, seen[2, "tap"], seen[2, "att before"], rows, None)
        twice = expected_attention(attention, sites, second, 2, seen[2, "tap"], once, rows, None)
    torch.testing.assert_close(seen[2, "att after"], twice, rtol=1e-6, atol=1e-7)
    assert (once - seen[2, "att before"]).abs().max() > 1e-3 < (twice - once).abs().max()


# ------------------------------------------------------------------------------------------------------------ explain


def test_explain_when_there_is_nothing_to_explain():
    model = make_model("llama")
    handle = uk.patch(model, edits_for(model, UnikeConfig()))
    with handle.disabled(), pytest.raises(RuntimeError, match="the patch is disabled"):
        handle.explain(**inputs_for(model, [5, 3]))


class Around(nn.Module):
    """What an adapter does: another module in the place of the one that it calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("site", ["self_attn", "fc1", "fc2"])
def test_a_site_that_was_replaced_says_so(site):
    """As dynamic quantisation does: the new module has no hooks, and the edits would be lost in silence."""
    model = make_model("opt")
    inputs = inputs_for(model, [5, 3])
    handle = uk.patch(model, edits_for(model))
    expected = model(**inputs).logits
    layer = model.model.decoder.layers[3]
    there = getattr(layer, site)
    setattr(layer, site, Around(there))
    assert torch.equal(model(**inputs).logits, expected)
    setattr(layer, site, getattr(make_model("opt").model.decoder.layers[3], site))
    with pytest.raises(RuntimeError, match=rf"layers.3.{site} was replaced after patch 'default'"):
        model(**inputs)
    with handle.disabled():
        model(**inputs)
    setattr(layer, site, there)
    assert torch.equal(model(**inputs).logits, expected)


def test_layer_outside_its_decoder_says_so():
    model = make_model("llama")
    uk.patch(model, edits_for(model))
    with pytest.raises(RuntimeError, match="an edited layer ran outside its decoder"):
        model.model.layers[3].mlp(torch.zeros(1, 2, 16))


def test_missing_inputs_are_the_models_own_error():
    model = make_model("llama")
    with pytest.raises(ValueError) as base:
        model()
    uk.patch(model, edits_for(model))
    with pytest.raises(ValueError) as ours:
        model()
    assert str(ours.value) == str(base.value)
