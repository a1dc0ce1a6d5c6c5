"""swap: other edits in the same storage, whole or not at all."""

import contextlib
from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from tests.models_tiny import ALWAYS, ROUTED, edits_for, inputs_for, make_model, text_inputs
from tests.sites_expected import shift_of
from tests.test_patching import snapshot, tensors
from unike_kernels.neurons import ExtraNeurons


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_swap_stays_in_its_storage(name, config):
    model = make_model(name)
    inputs = inputs_for(model, [5, 3])
    first = edits_for(model, config, prompts=inputs)
    second = edits_for(model, config, prompts={k: v[:1] for k, v in inputs.items()}, seed=5, neurons=4)
    room = {"max_groups": 4, "max_neurons": 9, "max_items": 10}
    with uk.patch(model, second, **room):
        expected = model(**inputs).logits
    handle = uk.patch(model, first, **room)
    original, kept = model(**inputs).logits, tensors(handle)
    pointers = [t.data_ptr() for m in model.modules() for t in m.buffers(recurse=False)]
    handle.swap(second)
    assert handle.edits is second
    assert torch.equal(model(**inputs).logits, expected)
    assert pointers == [t.data_ptr() for m in model.modules() for t in m.buffers(recurse=False)]
    handle.swap(first)
    assert torch.equal(model(**inputs).logits, original)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(handle), strict=True))  # nothing of the other is left
    if config is ROUTED:
        handle.swap(first.select([]))
        with handle.disabled():
            base = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, base)


SWAP_REFUSED = {
    "edits": ({"n_edits": 5, "neurons": 1}, r"room for 4 edits \(max_groups at patch time\), but got 5"),
    "neurons": ({"neurons": 4}, r"room for 9 neurons \(max_neurons at patch time\), but got 12"),
    "items": ({"more_items": 3}, r"room for 10 items \(max_items at patch time\), but got 12"),
    "everything": (
        {"n_edits": 6, "neurons": 4, "more_items": 3},
        r"^room for 4 edits .*, but got 6; room for 9 neurons .*, but got 24; room for 10 items .*, but got 15$",
    ),
    "layers": ({"layers": (1, 2)}, r"edits of layers \[1, 2, 3, 4\], not of \[1, 2\]"),
    "encoders": ({"shared_seed": 7}, "layer 1 has another encoder"),
    "depth": ({"encoder_maps": 1}, "layer 1 has an encoder of 2 maps, but got one of 1"),
    "shift": ({"config": shift_of(ALWAYS, k=3)}, r"same config \(patch, edits\): shift.k: 4 and 3;"),
    "beta": ({"config": replace(ALWAYS, neurons=replace(ALWAYS.neurons, beta=0.5))}, "neurons.beta: 0.1 and 0.5"),
    "routing": ({"config": ROUTED}, "routing.mode: always and routed"),
    "activation": (
        {"config": replace(ALWAYS, encoders=replace(ALWAYS.encoders, activation="relu"))},
        "encoders.activation: identity and relu",
    ),
}


@pytest.mark.parametrize("what", SWAP_REFUSED)
def test_refused_swap_changes_nothing(what):
    change, message = SWAP_REFUSED[what]
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    edits = edits_for(model)
    handle = uk.patch(model, edits, max_groups=4, max_neurons=9, max_items=10)
    before, kept, logits = snapshot(model), tensors(handle), model(**inputs)
    cache = model(**inputs, use_cache=True).past_key_values
    change = {"config": ALWAYS, **change}
    more = change.pop("more_items", 0)
    other = edits_for(model, **change)
    for shared in other.shared.values():
        shared.h_sem, shared.h_pos = (torch.cat([rows, rows[:more]]) for rows in (shared.h_sem, shared.h_pos))
    with pytest.raises(ValueError, match=message):
        handle.swap(other)
    assert snapshot(model) == before and handle.edits is edits
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(handle), strict=True))
    assert torch.equal(model(**inputs).logits, logits.logits)
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)  # still good


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_patch_makes_does_not_hang_on_the_modes_of_its_caller(mode):
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    edits, other = (edits_for(model, ROUTED, prompts=inputs, seed=seed) for seed in (0, 5))
    expected = tensors(uk.patch(model, edits))
    uk.unpatch(model)
    with MODES[mode]():
        handle = uk.patch(model, edits)
    found = tensors(handle)
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with MODES[mode]():
        handle.swap(other)
        handle.refresh()
    handle.swap(edits)
    model(**inputs).logits.sum().backward()
    with MODES[mode]():
        model.half()
    handle.swap(other)
    handle.refresh()


def test_swap_takes_the_same_edits_after_the_model_changed_its_dtype():
    model = make_model("llama")
    handle = uk.patch(model, edits_for(model))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        handle.swap(handle.edits)
    with pytest.raises(ValueError, match="another encoder"):
        handle.swap(edits_for(model, shared_seed=7))


def test_swap_that_fails_half_way_leaves_the_old_edits(monkeypatch):
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    kept, logits = tensors(handle), model(**inputs).logits
    load, calls = ExtraNeurons.load, []

    def fail(self, edits):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        load(self, edits)

    monkeypatch.setattr(ExtraNeurons, "load", fail)
    with pytest.raises(KeyboardInterrupt):
        handle.swap(edits_for(model, ROUTED, prompts=inputs, seed=5))
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(handle), strict=True))
    assert torch.equal(model(**inputs).logits, logits)


def test_swap_where_edits_are_chosen_is_refused():
    model = make_model("llama")
    handle = uk.patch(model, edits_for(model))
    kept = tensors(handle)
    with handle.choosing([handle.edits.ids[1]]), pytest.raises(ValueError, match="leave it first"):
        handle.swap(handle.edits.select(handle.edits.ids[:1]))
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(handle), strict=True))


def test_swap_refuses_another_architecture_and_a_patch_that_is_gone():
    model = make_model("llama")
    handle = uk.patch(model, edits_for(model))
    with pytest.raises(ValueError, match="another architecture"):
        handle.swap(edits_for(make_model("opt")))
    handle.remove()
    for act in (lambda: handle.swap(handle.edits), handle.refresh):
        with pytest.raises(ValueError, match="patch 'default' is no longer on the model"):
            act()


def test_caches_of_before_a_swap_are_refused():
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    edits, other = edits_for(model), edits_for(model, seed=5)
    handle = uk.patch(model, edits)
    token = {"input_ids": torch.tensor([[5], [6]])}
    for change in (lambda: handle.swap(other), handle.refresh):
        cache = model(**inputs, use_cache=True).past_key_values
        model(**token, past_key_values=cache)
        change()
        with pytest.raises(ValueError, match="before the edits of this patch changed"):
            model(**token, past_key_values=cache)
    handle.set_cases(torch.zeros(5).long(), torch.tensor([4]))
    model(**text_inputs([5]))
    handle.set_cases(torch.zeros(1).long(), torch.tensor([-1]))
    model(input_ids=torch.tensor([[5]]))
    handle.swap(edits)
    with pytest.raises(ValueError, match="the edits changed since"):
        model(input_ids=torch.tensor([[5]]))


@pytest.mark.parametrize("change", ["no shift", "no neurons", "room for neurons"])
def test_swap_where_a_kind_of_site_is_missing(change):
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3])
    config, neurons = (shift_of(ALWAYS, enabled=False), 2) if change == "no shift" else (ALWAYS, 0)
    handle = uk.patch(model, edits_for(model, config, neurons=neurons), max_neurons=6 if "room" in change else None)
    other = edits_for(model, config, seed=5)
    if change == "no neurons":
        with pytest.raises(ValueError, match=r"room for 0 neurons \(max_neurons at patch time\), but got 6"):
            handle.swap(other)
        handle.swap(edits_for(model, config, neurons=0, seed=5))
        return
    handle.swap(other)
    swapped = model(**inputs).logits
    handle.remove()
    with uk.patch(model, other):
        torch.testing.assert_close(model(**inputs).logits, swapped)


def test_items_without_the_edits_own():
    model = make_model("llama")
    edits = edits_for(model, shift_of(ALWAYS, own_item=False))
    handle = uk.patch(model, edits, max_items=6)  # six in the memory; the three edits' own do not count
    assert {s.rows for s in uk.status(model) if s.kind == "shift"} == {6}
    handle.swap(edits_for(model, shift_of(ALWAYS, own_item=False), n_edits=2, seed=5))
    with pytest.raises(ValueError, match="room for 6 items"):
        uk.patch(model, edits_for(model), name="other", max_items=6)


def test_routing_asked_for_wins_over_the_edits():
    model = make_model("llama")
    inputs = inputs_for(model, [5, 3, 4])
    prompts = {k: v[:2] for k, v in inputs.items()}
    always, routed = (edits_for(model, config, prompts=prompts) for config in (ALWAYS, ROUTED))
    logits = {}
    for name, edits, routing in (("always", always, "edits"), ("routed", routed, "edits"), ("asked", routed, "always")):
        with uk.patch(model, edits, routing=routing):
            logits[name] = model(**inputs).logits
    assert torch.equal(logits["always"], logits["asked"]) and not torch.equal(logits["always"], logits["routed"])
    with uk.patch(model, always, routing="routed") as handle:
        handle.swap(always)
        model(**inputs)
        assert handle.record.runtime.tracker.current.state.selected.tolist() == [[0], [1], [-1]]
