"""What every site adds, against a straightforward recomputation from the specification."""

import copy
import pickle
from dataclasses import replace

import accelerate
import pytest
import torch

import unike_kernels as uk
from tests.models_tiny import ALWAYS, HEADS, ROUTED, edits_for, inputs_for, make_model, row_of
from tests.sites_expected import Recording, cases_of, expected_attention, expected_ffn, shift_of
from unike_kernels import backends, native
from unike_kernels.models import find_decoder, get_module

# Biases and no gate; grouped-query heads; norms of every head and another head size; norms of all heads at once.
FAMILIES = ("opt", "llama", "qwen3", "olmo2")


CONFIGS = {
    "paper": ALWAYS,
    "clamped": shift_of(ALWAYS, clamp=True),
    "letter": shift_of(ALWAYS, orientation="input"),
    "fixed": shift_of(ALWAYS, alpha=0.3),
    "fixed letter": shift_of(ALWAYS, alpha=0.3, orientation="input"),
    "causal": shift_of(ALWAYS, positions="from_case_token"),
    "token": shift_of(ALWAYS, per="token"),
    "token, causal, fixed": shift_of(ALWAYS, per="token", positions="from_case_token", alpha=0.3),
    "raw": shift_of(ALWAYS, attention="raw"),
    "raw, token": shift_of(ALWAYS, attention="raw", per="token"),
    "no own items": shift_of(ALWAYS, own_item=False),
    "one item": shift_of(ALWAYS, k=1),
    "more than there are": shift_of(ALWAYS, k=40),
    "routed": ROUTED,
    "routed, causal": shift_of(ROUTED, positions="from_case_token"),
    "routed, letter": shift_of(ROUTED, orientation="input"),
    "routed, raw": shift_of(ROUTED, attention="raw"),
    "routed, token": shift_of(ROUTED, per="token"),
    "neurons alone": shift_of(ALWAYS, enabled=False),
    "gelu encoder": replace(ALWAYS, encoders=replace(ALWAYS.encoders, activation="gelu")),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("what", CONFIGS)
def test_sites_do_what_the_specification_says(what, name):
    config = CONFIGS[what]
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(
        model, config, prompts={k: v[:2] for k, v in inputs.items()}, neurons=[[1, 2, 0, 2], [2, 0, 3, 1]]
    )
    decoder, rows = find_decoder(model), cases_of(inputs)
    with uk.patch(model, edits) as handle, Recording(model, edits.layers) as recording, torch.no_grad():
        model(**inputs)
        seen, state = recording.seen, handle.record.runtime.tracker.current.state
        selected = None if state.selected is None else state.selected.tolist()
        if config.routing.mode == "routed":
            assert selected == [[0], [1], [-1]]
        shifted = 0.0
        for layer in edits.layers:
            sites = decoder.layers[layer]
            attention = get_module(model, sites.attention)
            wanted = expected_attention(
                attention, sites, edits, layer, seen[layer, "tap"], seen[layer, "att before"], rows, selected
            )
            torch.testing.assert_close(seen[layer, "att after"], wanted, rtol=1e-6, atol=1e-7)
            shifted = max(shifted, float((wanted - seen[layer, "att before"]).abs().max()))
            wanted = expected_ffn(edits, layer, seen[layer, "x"], seen[layer, "ffn before"], rows, selected, sites.act)
            torch.testing.assert_close(seen[layer, "ffn after"], wanted, rtol=1e-6, atol=1e-7)
        assert (shifted > 1e-3) == config.shift.enabled


@pytest.mark.parametrize("plain", [True, False])
def test_a_layers_own_scaling_and_soft_cap(plain):
    model = make_model("llama", dtype=torch.float64)
    inputs = inputs_for(model, (5, 3))
    edits, found = edits_for(model, layers=(2,)), find_decoder(model)
    sites = replace(found, layers=tuple(replace(layer, scaling=2.0, softcap=0.7) for layer in found.layers))
    attention = get_module(model, sites.layers[2].attention)
    if not plain:
        attention.o_proj.register_forward_hook(lambda module, args, output: None)
    with uk.patch(model, edits, sites=sites), Recording(model, (2,)) as recording, torch.no_grad():
        model(**inputs)
    tap, before, after = (recording.seen[2, what] for what in ("tap", "att before", "att after"))
    rows = cases_of(inputs)
    wanted = expected_attention(attention, sites.layers[2], edits, 2, tap, before, rows, None)
    other = expected_attention(attention, found.layers[2], edits, 2, tap, before, rows, None)
    torch.testing.assert_close(after, wanted, rtol=1e-6, atol=1e-7)
    assert (wanted - other).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_half_precision(name, dtype):
    """At every site within a few roundings of the same computation in float64, from the same states."""
    model = make_model(name, dtype=dtype)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()})
    exact, rows = make_model(name, dtype=dtype).double(), cases_of(inputs)
    with uk.patch(model, edits) as handle, Recording(model, edits.layers) as recording, torch.no_grad():
        model(**inputs)
        state = handle.record.runtime.tracker.current.state
        selected = state.selected.tolist()
        assert selected == [[0], [1], [-1]]
        rounded = edits.to(dtype=dtype).to(dtype=torch.float64)
        for layer, sites in ((i, find_decoder(model).layers[i]) for i in edits.layers):
            assert state.layers[layer].alpha.dtype == torch.float32
            seen = {what: t.double() for (at, what), t in recording.seen.items() if at == layer}
            attention = get_module(exact, sites.attention)
            wanted = expected_attention(
                attention, sites, rounded, layer, seen["tap"], seen["att before"], rows, selected
            )
            eps = torch.finfo(dtype).eps
            assert (seen["att after"] - wanted).abs().max() <= 4 * eps * wanted.abs().max()
            wanted = expected_ffn(rounded, layer, seen["x"], seen["ffn before"], rows, selected, sites.act)
            assert (seen["ffn after"] - wanted).abs().max() <= 4 * eps * wanted.abs().max()


# ------------------------------------------------------------------------------------------------ nothing selected


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("per", ["case", "token"])
@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_case_that_no_edit_claims_passes_bit_for_bit(name, per, orientation, alpha):
    model = make_model(name)
    inputs = inputs_for(model, (5, 3, 4))
    base = model(**inputs).logits
    config = shift_of(ROUTED, per=per, orientation=orientation, alpha=alpha)
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
    with uk.patch(model, edits) as handle:
        edited = model(**inputs).logits
        assert torch.equal(edited[2], base[2])
        assert (edited[:2] - base[:2]).abs().amax(dim=(1, 2)).min() > 1e-3
        nothing = 0.0 if orientation == "knowledge" else 1.0
        layers = handle.record.runtime.tracker.current.state.layers
        assert all(d.alpha[2] == nothing and (d.indices[2] == -1).all() for d in layers.values())
        alone = {**row_of(inputs, 2)}
        with handle.disabled():
            expected = model(**alone).logits
        assert torch.equal(model(**alone).logits, expected)  # nothing at all to do: another way through the code


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("change", [{"n_edits": 0}, {"neurons": 0, "n_items": 0}, {"k": 0, "neurons": 0}], ids=str)
def test_edits_of_nothing_change_nothing(change, config):
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    base = model(**inputs).logits
    change = dict(change)
    if "k" in change:
        config = shift_of(config, k=change.pop("k"))
    if change.get("n_items") == 0:
        config = shift_of(config, own_item=False)
    if change.get("n_edits") == 0:
        config = shift_of(config, enabled=config is ROUTED)  # always on, the shared memory still shifts
    with uk.patch(model, edits_for(model, config, **change)):
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_positions_before_the_case_token_are_the_base_bit_for_bit(name):
    model = make_model(name)
    inputs = inputs_for(model, (6, 6))
    labels = inputs["input_ids"].masked_fill(torch.arange(6) < 4, -100)  # case token 3, then two answer tokens
    base = model(**inputs).logits
    for config, neurons in ((ALWAYS, 0), (ROUTED, 2)):
        config = shift_of(config, positions="from_case_token")
        prompts = {k: v[:, :4] for k, v in inputs.items()}
        with uk.patch(model, edits_for(model, config, prompts=prompts, neurons=neurons)):
            edited = model(**inputs, labels=labels).logits
        assert torch.equal(edited[:, :3], base[:, :3])
        assert (edited[:, 3:] - base[:, 3:]).abs().amax(dim=-1).amin() > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_edit_that_is_not_selected_never_leaks(name, poison):
    model = make_model(name)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, ROUTED, prompts=inputs)
    with uk.patch(model, edits, max_neurons=40, max_groups=9, max_items=40) as handle:
        rows = {k: v[:2] for k, v in inputs.items()}
        clean = model(**rows).logits
        for layer in handle.record.layers:
            spare = layer.neurons.group_ptr[2]  # edit 2's neurons and the spare ones
            for tensor in (layer.neurons.keys, layer.neurons.key_bias, layer.neurons.values):
                tensor[spare:] = poison
            if layer.neurons.up is not None:
                layer.neurons.up[spare:] = poison
            own = int(layer.shift.memory.counts[0]) + 2
            for tensor in (layer.shift.memory.sem, layer.shift.memory.keys, layer.shift.memory.values):
                tensor[own:] = poison
            layer.shift.memory.sem_norm[own:] = poison
        assert torch.equal(model(**rows).logits, clean)
        assert clean.isfinite().all()
        assert not model(**inputs).logits[2].isfinite().all()  # its own case does meet it


def test_spare_rows_are_never_read():
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model)
    with uk.patch(model, edits):
        expected = model(**inputs).logits
    with uk.patch(model, edits, max_neurons=40, max_groups=9, max_items=40) as handle:
        torch.testing.assert_close(model(**inputs).logits, expected)
        for layer in handle.record.layers:
            layer.neurons.keys[6:] = layer.neurons.values[6:] = float("nan")
            layer.shift.memory.sem[9:] = layer.shift.memory.keys[9:] = float("nan")
        torch.testing.assert_close(model(**inputs).logits, expected)


# ----------------------------------------------------------------------------------------------- other ways through


@pytest.mark.parametrize("what", ["paper", "letter", "fixed", "causal", "token", "routed", "routed, letter"])
@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_called_output_projection_equals_the_one_that_is_read(name, what):
    config = CONFIGS[what]
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
    base = model(**inputs).logits
    with uk.patch(model, edits) as handle:
        plain = model(**inputs).logits
        alphas = [d.alpha for d in handle.record.runtime.tracker.current.state.layers.values()]
        for layer in handle.record.layers:
            attention = get_module(model, find_decoder(model).layers[layer.index].attention)
            out = attention.out_proj if name == "opt" else attention.o_proj
            out.register_forward_hook(lambda module, args, output: None)  # from here on it must be called
        called = model(**inputs).logits
        weights = [p for n, p in model.named_parameters() if "proj" in n and "layers.2" in n]
        grads = [torch.autograd.grad(logits.square().sum(), weights) for logits in (plain, called)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)
        again = [d.alpha for d in handle.record.runtime.tracker.current.state.layers.values()]
        torch.testing.assert_close(called, plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alphas, again, rtol=1e-9, atol=1e-9)
        assert torch.equal(called[2], base[2]) == (config.routing.mode == "routed")


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "accelerate's hook"])
def test_what_others_do_to_the_output_projection_reaches_the_knowledge(kind):
    model = make_model("llama", dtype=torch.float64)
    inputs = inputs_for(model, (5, 3))
    out = model.model.layers[2].self_attn.o_proj
    with uk.patch(model, edits_for(model, shift_of(ALWAYS, alpha=1.0), layers=(2,))), Recording(model, (2,)) as seen:
        model(**inputs)
        plain = seen.seen[2, "att after"]  # h_know alone
        if kind == "forward hook":
            out.register_forward_hook(lambda module, args, output: output * 2)
        elif kind == "forward pre-hook":
            out.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            accelerate.hooks.add_hook_to_module(out, Doubling())
        model(**inputs)
        real = inputs["attention_mask"].flatten() != 0
        torch.testing.assert_close(seen.seen[2, "att after"][real], 2 * plain[real])


def test_autocast_keeps_what_is_accumulated_in_float32():
    model = make_model("opt")
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()})
    with uk.patch(model, edits) as handle, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
        state = handle.record.runtime.tracker.current.state
    assert state.selected.tolist() == [[0], [1], [-1]]
    assert all(d.alpha.dtype == torch.float32 and d.scores.dtype == torch.float32 for d in state.layers.values())


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gradients_of_a_group_in_training(name):
    """While an edit is trained its tensors are leaves in the module's place, zeta' apart from the values."""
    model = make_model(name, dtype=torch.float64)
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model, prompts=inputs).to(dtype=torch.float64)
    with uk.patch(model, edits) as handle:
        expected = model(**inputs).logits
        leaves = []
        for layer in handle.record.layers:
            own = edits.layers[layer.index]
            fields = ["keys", "key_bias", "values", "zeta"] + ["up", "up_bias"] * (own.up is not None)
            for field in fields:
                leaf = getattr(own, field).clone().requires_grad_()
                setattr(layer.neurons, field, leaf)
                leaves.append(leaf)
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected)
        grads = torch.autograd.grad(logits.square().sum(), leaves)
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)
        with pytest.warns(UserWarning, match="save_pretrained"):
            assert not any("unike" in key for key in model.state_dict())


# --------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("config", [ALWAYS, ROUTED, shift_of(ROUTED, per="token")], ids=["always", "routed", "token"])
@pytest.mark.parametrize("name", ["opt", "llama", "blip2", "llava"])
def test_explain_names_an_edits_own_item_first(name, config):
    model = make_model(name)
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})
    with uk.patch(model, edits) as handle:
        reports = handle.explain(**inputs)
        state = handle.record.runtime.tracker.current.state
    assert [r.case for r in reports] == [0, 1, 2]
    for case in (0, 1):
        first, score = reports[case].layers[0].items[0]
        assert first == f"edit {edits.ids[case]}" and score > 0.999
        assert len(reports[case].layers) == 4 and all(len(layer.items) == 4 for layer in reports[case].layers)
        assert reports[case].layers[1].alpha == pytest.approx(float(state.layers[2].alpha[case]))
        text = str(reports[case])
        assert text.startswith(f"case {case}: edits that act: ") and f"edit {edits.ids[case]} 1.000" in text
    if config.routing.mode == "routed":
        assert [[i for i, _ in r.edits] for r in reports] == [[edits.ids[0]], [edits.ids[1]], []]
        assert str(reports[2]).splitlines()[1] == "  layer 1: alpha 0.000; nothing retrieved"
    else:
        assert reports[2].edits == tuple((i, None) for i in edits.ids)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("orientation", ["knowledge", "input"])
@pytest.mark.parametrize("per", ["case", "token"])
def test_explain_lists_every_layer_of_a_question_that_no_edit_claims(per, orientation, alpha):
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3, 4))
    config = shift_of(ROUTED, per=per, orientation=orientation, alpha=alpha)
    with uk.patch(model, edits_for(model, config, prompts={k: v[:2] for k, v in inputs.items()})) as handle:
        ((alone,), together) = (handle.explain(**given) for given in (row_of(inputs, 2), inputs))
    nothing = 0.0 if orientation == "knowledge" else 1.0
    assert [(layer.items, layer.alpha) for layer in alone.layers] == [((), nothing)] * len(handle.edits.layers)
    assert alone.edits == () and alone.layers == together[2].layers


def test_heads_are_what_the_families_promise():
    sizes = {name: find_decoder(make_model(name)).layers[0] for name in FAMILIES}
    assert {n: (s.heads, s.kv_heads, s.head_dim) for n, s in sizes.items()} == {
        "opt": (HEADS, HEADS, 4),
        "llama": (HEADS, 2, 4),
        "qwen3": (HEADS, 2, 6),
        "olmo2": (HEADS, 2, 4),
    }


def test_backend_is_chosen_once_and_anew_where_the_tensors_move(monkeypatch):
    """No call asks which backend runs; a patch made before the model moved follows it."""
    asked = []
    resolve = backends.resolve

    def noting(backend, device, dtype):
        asked.append(dtype)
        return resolve(backend, device, dtype)

    monkeypatch.setattr(backends, "resolve", noting)
    model = make_model("opt")
    inputs = inputs_for(model, (5, 4))
    handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    layers = handle.record.layers
    chosen = [m for layer in layers for m in (layer.neurons, layer.shift, layer.shift.memory, layer.router) if m]
    here = "reference" if native.cpu() is None else "auto"  # native code serves those calls that are small enough
    assert {m.backend for m in chosen} == {here}
    assert {m.asked for m in chosen} == {"auto"}
    assert {s.backend for s in uk.status(model)} == {resolve("auto", torch.device("cpu"), torch.float32)}
    asked.clear()
    with torch.no_grad():
        model(**inputs)
    assert not asked
    model.double()
    assert asked.count(torch.float64) >= 3 * len(layers)
    moved = pickle.loads(pickle.dumps(layers[0].neurons))
    assert moved.backend == "reference" and moved.asked == "auto"  # float64 now
    monkeypatch.setattr(backends, "resolve", lambda *args: "triton")
    assert copy.deepcopy(layers[0].neurons).backend == "triton"  # as if its tensors were on a GPU now
