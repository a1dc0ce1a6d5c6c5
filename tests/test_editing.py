"""Edits reach their targets, do not depend on each other, and leave the model as it was."""

import warnings
from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import (
    FAST,
    answers,
    ask,
    assert_close_layers,
    assert_same_state,
    make_editor,
    make_processor,
    make_requests,
    make_triplets,
    routed,
    samples_of,
    state_of,
)
from tests.models_tiny import MULTIMODAL, make_model
from unike_kernels.config import NeuronConfig, RoutingConfig, ShiftConfig, UnikeConfig
from unike_kernels.editing import editor as editor_module
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.train import GroupTrainer, _spread

NAMES = ("opt", "llama", "blip2", "llava")
QUIET = {"progress": False}


@pytest.mark.parametrize("name", NAMES)
def test_routed_edits_answer_with_their_targets(name, editors):
    editor, requests = editors(name), make_requests(name)
    base = answers(editor, requests)
    assert base != [r["target"] for r in requests]
    edits = editor.edit(requests, **QUIET)
    assert edits.ids == [r["id"] for r in requests]
    assert all(e.success and e.neurons == dict.fromkeys(editor.layers, 10) and 0 < e.steps <= 30 for e in edits.entries)
    with uk.patch(editor.model, edits):
        assert answers(editor, requests) == [r["target"] for r in requests]
    assert answers(editor, requests) == base


@pytest.mark.parametrize("name", NAMES)
def test_an_always_on_edit_answers_with_its_target(name, editors):
    editor, (request, *_) = editors(name), make_requests(name)
    edits = editor.edit([request], independent=False, **QUIET)
    with uk.patch(editor.model, edits, routing="always"):
        assert answers(editor, [request]) == [request["target"]]


@pytest.mark.parametrize("name", MULTIMODAL)
def test_requests_with_and_without_pictures_keep_their_order(name, editors):
    editor = editors(name)
    requests = make_requests(name, 3)
    requests.insert(1, {"id": "text", **ask(name, "which house ?", None), "target": "big sun"})
    edits = editor.edit(requests, **QUIET)
    assert edits.ids == [r["id"] for r in requests] and edits.entries[1].image is None
    with uk.patch(editor.model, edits):
        assert answers(editor, requests) == [r["target"] for r in requests]


def test_bfloat16_runs_the_same_code():
    editor, requests = make_editor("blip2", dtype=torch.bfloat16), make_requests("blip2", 3)
    edits = editor.edit(requests, **QUIET)
    assert edits.layers[4].keys.dtype == torch.float32 and all(e.success for e in edits.entries)
    with uk.patch(editor.model, edits) as handle:
        assert handle.record.layers[0].neurons.keys.dtype == torch.bfloat16
        assert answers(editor, requests) == [r["target"] for r in requests]
    steps = [e.steps for e in make_editor("blip2").edit(requests, **QUIET).entries]
    assert all(abs(a.steps - b) <= 5 for a, b in zip(edits.entries, steps, strict=True))  # rates survive the rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("independent", [True, False])
def test_the_recorded_loss_is_the_patched_models(independent, dtype):
    """What is reported after training is what a user gets who patches the saved edits."""
    editor = make_editor("llama", dtype=dtype)
    requests = make_requests("llama", 3)
    edits = editor.edit(requests, independent=independent, **QUIET)
    last = 0 if independent else 2  # of sequential edits only the last one was measured with all of them active
    with uk.patch(editor.model, edits, routing="always") as handle, torch.no_grad():
        for n, request in enumerate(requests[last:], start=last):
            batch = editor.collator.batch(samples_of([request]), [0])
            handle.set_cases(batch.token_to_case(), batch.case_rows())
            if independent:
                with handle.choosing([edits.ids[n]]):
                    logits = editor.model(**batch.inputs).logits.float()
            else:
                logits = editor.model(**batch.inputs).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch.labels()[0, 1:], ignore_index=-100)
            tolerance = 1e-4 if dtype == torch.float32 else 0.1  # bf16 batches round otherwise than single rows
            assert edits.entries[n].loss == pytest.approx(float(loss), abs=tolerance)


@pytest.mark.parametrize(
    "shift",
    [
        {"attention": "raw"},
        {"per": "token"},
        {"positions": "from_case_token"},
        {"orientation": "input", "clamp": False},
        {"alpha": 0.5},
        {"own_item": False},
        {"k": 0},
        {"enabled": False},
    ],
    ids=str,
)
def test_every_shift_trains_as_it_is_patched(shift):
    """Neurons learn beside the very shift that the patched model has: same loss, and the target is said."""
    editor = make_editor("blip2", replace(routed(), shift=ShiftConfig(**shift)))
    requests = make_requests("blip2", 2)
    edits = editor.edit(requests, **QUIET)
    with uk.patch(editor.model, edits) as handle, torch.no_grad():
        assert answers(editor, requests) == [r["target"] for r in requests]
        batch = editor.collator.batch(samples_of(requests), [0, 1])
        with handle.choosing(edits.ids):
            logits = editor.model(**batch.inputs, labels=batch.labels()).logits
    for row, labels, entry in zip(logits, batch.labels(), edits.entries, strict=True):
        loss = torch.nn.functional.cross_entropy(row[:-1], labels[1:], ignore_index=-100)
        assert entry.loss == pytest.approx(float(loss), abs=1e-3)


def test_a_missed_target_is_kept_flagged_and_said():
    editor = make_editor("opt", routed(steps=1, lr_values=1e-6, lr_keys=0.0))
    with pytest.warns(UserWarning, match="3 of 3 edits miss their target: e0, e1, e2"):
        edits = editor.edit(make_requests("opt", 3), **QUIET)
    assert [e.success for e in edits.entries] == [False] * 3 and len(edits.layers[2].keys) == 30
    assert [e.steps for e in edits.entries] == [1] * 3
    with warnings.catch_warnings():  # what was missed before is not said again
        warnings.simplefilter("error")
        editor.config = routed()
        more = editor.edit([{"id": "new", "prompt": "what ?", "target": "moon"}], onto=edits, **QUIET)
    assert [e.success for e in more.entries] == [False, False, False, True]


def test_edits_without_neurons_are_items_alone():
    config = UnikeConfig(encoders=FAST, neurons=NeuronConfig(enabled=False))
    editor = make_editor("blip2", config)
    requests = make_requests("blip2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edits = editor.edit(requests, **QUIET)
    assert all(len(layer.keys) == 0 and len(layer.h_sem) == 4 for layer in edits.layers.values())
    own = editor.own_items(samples_of(requests))
    for i, (h_sem, h_pos) in own.items():
        torch.testing.assert_close((edits.layers[i].h_sem, edits.layers[i].h_pos), (h_sem, h_pos), rtol=1e-4, atol=1e-5)
    batch = editor.collator.batch(samples_of(requests), [0])
    with torch.no_grad():
        base = editor.model(**batch.inputs).logits
        with uk.patch(editor.model, edits):
            assert (editor.model(**batch.inputs).logits - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["opt", "llava"])
def test_a_batch_of_edits_is_the_same_edits_one_by_one(name):
    editor = make_editor(name, dtype=torch.float64)
    requests = make_requests(name)
    together = editor.edit(requests, **QUIET)
    assert len({e.steps for e in together.entries}) > 1  # an edit that is done waits for the others, unchanged
    for e, request in enumerate(requests):
        alone = editor.edit([request], **QUIET)
        for i in editor.layers:
            assert_close_layers(together.select([request["id"]]).layers[i], alone.layers[i], rtol=1e-4, atol=1e-5)
        a, b = together.entries[e], alone.entries[0]
        assert (a.steps, a.success) == (b.steps, b.success) and a.loss == pytest.approx(b.loss, abs=1e-5)


def test_an_edit_that_is_done_stays():
    """With the steps that it took as the limit, an edit ends at the same place: nothing moves it afterwards."""
    editor = make_editor("opt", routed(margin=2.0), dtype=torch.float64)
    requests = make_requests("opt", 3)
    edits = editor.edit(requests, **QUIET)
    steps = [e.steps for e in edits.entries]
    first = steps.index(min(steps))
    assert steps.count(min(steps)) == 1
    editor.config = routed(margin=2.0, steps=min(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the others miss their targets
        short = editor.edit(requests, **QUIET)
    name = requests[first]["id"]
    for i in editor.layers:
        assert_close_layers(edits.select([name]).layers[i], short.select([name]).layers[i], rtol=0, atol=0)
    assert edits.entries[first] == short.entries[first]


def test_an_edit_that_overflows_is_held_at_its_last_finite_state():
    editor = make_editor("opt", routed(lr_values=1e30, lr_keys=0.0, steps=3))
    with pytest.warns(UserWarning, match="miss their target"):
        edits = editor.edit(make_requests("opt", 2), **QUIET)
    edits.validate()  # everything finite
    assert not any(e.success for e in edits.entries)


def test_sequential_edits_build_on_the_ones_before(editors):
    editor, requests = editors("llama"), make_requests("llama", 3)
    one = editor.edit(requests[:1], independent=False, **QUIET)
    three = editor.edit(requests, independent=False, **QUIET)
    onto = editor.edit(requests[1:], onto=one, independent=False, **QUIET)
    apart = editor.edit(requests, independent=True, **QUIET)
    for i in editor.layers:
        assert_close_layers(three.select(["e0"]).layers[i], one.layers[i], rtol=0, atol=0)  # never touched again
        assert_close_layers(three.layers[i], onto.layers[i], rtol=0, atol=0)
    # the third was trained with the first two active, so it is another one than without them
    moved = (three.select(["e2"]).layers[4].values - apart.select(["e2"]).layers[4].values).abs().max()
    assert moved > 1e-2
    with uk.patch(editor.model, three, routing="always"):
        assert answers(editor, requests[2:]) == [requests[2]["target"]]


def test_routed_edits_stack_in_any_order_and_leave_without_a_trace(editors):
    editor, requests = editors("blip2"), make_requests("blip2", 5)
    edits = editor.edit(requests[:3], **QUIET)
    edits = editor.edit(requests[3:], onto=edits, **QUIET)
    batch = editor.collator.batch(samples_of(requests), list(range(5)))

    def logits(which=None):
        with torch.no_grad():
            if which is None:
                return editor.model(**batch.inputs, labels=batch.labels()).logits
            with uk.patch(editor.model, which):
                return editor.model(**batch.inputs, labels=batch.labels()).logits

    base, all_ = logits(), logits(edits)
    assert (all_ - base).abs().amax(dim=(1, 2)).min() > 1e-2
    torch.testing.assert_close(logits(edits.select(edits.ids[::-1])), all_)
    less = logits(edits.remove("e1"))
    others = [0, 2, 3, 4]
    assert torch.equal(less[others], all_[others])
    assert torch.equal(less[others], logits(edits.select([f"e{i}" for i in others]))[others])
    assert (less[1] - all_[1]).abs().max() > 1e-2
    assert torch.equal(logits(), base)


def unlike_evaluation(model):
    """A model as a user may hand it over: part in training mode, part frozen."""
    model.train()
    model.vision_model.eval()
    model.vision_model.requires_grad_(False)
    return model


def test_the_model_is_restored_after_everything():
    model = unlike_evaluation(make_model("blip2"))
    model.__deepcopy__ = lambda memo: pytest.fail("the model was copied")
    before = state_of(model)
    editor = Editor(model, make_processor("blip2"), routed())
    editor.build_memory(make_triplets("blip2"), **QUIET)
    assert_same_state(model, before)
    editor.fit()
    editor.calibrate([ask("blip2", "what ?", 7)])
    assert_same_state(model, before)
    for independent in (True, False):
        edits = editor.edit(make_requests("blip2", 2), independent=independent, **QUIET)
        assert_same_state(model, before)
    editor.check(edits, [{"kind": "t_loc", "prompt": "what ?", "target": "moon"}])
    assert_same_state(model, before)


@pytest.mark.parametrize("where", ["prefix", "second step", "last edit", "extraction", "W_zeta"])
def test_the_model_is_restored_after_an_error(where, monkeypatch):
    editor = make_editor("blip2", routed(batch_size=2))
    model = unlike_evaluation(editor.model)
    before, calls = state_of(model), []

    def fail_after(n, real):
        def run(*args, **kw):
            calls.append(1)
            if len(calls) > n:
                raise KeyboardInterrupt
            return real(*args, **kw)

        return run

    if where == "prefix":
        monkeypatch.setattr(GroupTrainer, "_pass", fail_after(0, None))
    elif where == "extraction":
        monkeypatch.setattr(editor_module.Extraction, "_chunk", fail_after(0, None))
    else:
        n = {"second step": 1, "W_zeta": 3}.get(where, 0)
        if where == "last edit":  # how many steps there are differs with the weights that a transformers draws
            with monkeypatch.context() as counting:
                counting.setattr(GroupTrainer, "_forward", fail_after(1000, GroupTrainer._forward))
                make_editor("blip2", routed(batch_size=2)).edit(make_requests("blip2", 6), **QUIET)
            n = len(calls) - 1
            calls.clear()
        monkeypatch.setattr(GroupTrainer, "_forward", fail_after(n, GroupTrainer._forward))
    memory, fits = editor.states, editor.fits
    with pytest.raises(KeyboardInterrupt):
        if where == "extraction":
            editor.build_memory(make_triplets("blip2"), **QUIET)
        elif where == "W_zeta":
            editor.config = replace(editor.config, encoders=replace(FAST, w_zeta="trained"))
            editor.fit()
        else:
            editor.edit(make_requests("blip2", 6), **QUIET)
    assert_same_state(model, before)
    assert editor.states is memory and editor.fits is fits
    monkeypatch.undo()
    assert len(editor.edit(make_requests("blip2", 2), **QUIET)) == 2


def test_a_model_with_edits_is_refused_unless_they_are_off(editors):
    editor, requests = make_editor("llama"), make_requests("llama", 2)
    clean = editor.edit(requests, **QUIET)
    with uk.patch(editor.model, clean, name="mine") as handle:
        for call in (
            lambda: editor.edit(requests),
            lambda: editor.build_memory(make_triplets("llama")),
            lambda: editor.calibrate([{"prompt": "what"}]),
            lambda: editor.check(clean, [{"kind": "rel", "prompt": "what", "target": "moon"}]),
        ):
            with pytest.raises(ValueError, match=r"carries edits \(mine\).*inside handle.disabled\(\)"):
                call()
        with handle.disabled():
            again = editor.edit(requests, **QUIET)
        assert [s.name for s in uk.status(editor.model)] == ["mine"] * len(uk.status(editor.model)) != []
    for i in editor.layers:
        assert_close_layers(again.layers[i], clean.layers[i], rtol=0, atol=0)


def test_edits_can_be_made_where_gradients_are_off(editors):
    editor, requests = editors("opt"), make_requests("opt", 1)
    with torch.no_grad():
        assert editor.edit(requests, **QUIET).entries[0].success


def test_same_request_same_edit(editors):
    editor, requests = editors("blip2"), make_requests("blip2", 2)
    torch.manual_seed(1)
    a = editor.edit(requests, **QUIET)
    random = torch.get_rng_state()
    b = editor.edit(requests, **QUIET)
    assert torch.equal(random, torch.get_rng_state())
    for i in editor.layers:
        assert_close_layers(a.layers[i], b.layers[i], rtol=0, atol=0)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_keys_start_just_active_where_the_target_is_predicted(name, center):
    """Pre-activation 1 at a state that predicts a target token, 0 where its projection falls to the threshold."""
    editor = make_editor(name, routed(key_noise=0.0, key_threshold=0.6, center_keys=center, per_layer=4, steps=1))
    started = {}
    trainer_start = GroupTrainer._start

    def start(self, batch, inputs):
        leaves = trainer_start(self, batch, inputs)
        copies = {i: {k: t.detach().clone() for k, t in rows.items()} for i, rows in leaves.items()}
        started.update(batch=batch, inputs=inputs, leaves=copies)
        return leaves

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(GroupTrainer, "_start", start)
        editor.edit(make_requests(name, 2), **QUIET)
    assert editor.states is not None
    batch = started["batch"]
    for i, rows in started["leaves"].items():
        mean = editor.states.ffn_mean[i] if center else torch.zeros(16)
        for e in range(2):
            states = started["inputs"][i][e]
            at = (batch.target_mask[e].nonzero()[:, 0] - 1)[torch.arange(4) % int(batch.target_mask[e].sum())]
            own = slice(4 * e, 4 * e + 4)
            keys, bias = rows["keys"][own], rows["key_bias"][own]
            here = states[at]
            torch.testing.assert_close((here * keys).sum(-1) + bias, torch.ones(4), rtol=1e-3, atol=1e-3)
            edge = mean + 0.6 * (here - mean)
            torch.testing.assert_close((edge * keys).sum(-1) + bias, torch.zeros(4), rtol=1e-3, atol=1e-3)
            if name == "llama":
                up = (here * rows["up"][own]).sum(-1) + rows["up_bias"][own].detach()
                torch.testing.assert_close(up, torch.ones(4), rtol=1e-3, atol=1e-3)
            assert (rows["values"] == 0).all()


def test_long_targets_have_a_neuron_along_all_of_their_length():
    assert _spread(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert _spread(10, 4).tolist() == [0, 2, 5, 7]
    editor = make_editor("opt", routed(per_layer=6, steps=60))
    request = {"prompt": "what is this ?", "target": "a red dog of the big house of the new moon", "id": "long"}
    edits = editor.edit([request], **QUIET)
    assert edits.entries[0].success
    with uk.patch(editor.model, edits):
        assert editor.collator.generate(samples_of([request]), max_new_tokens=12) == [request["target"]]


def test_routing_modes_pick_how_requests_train(monkeypatch):
    """Routed edits train together by default, always-on ones one after another."""
    seen, real = [], Editor._append

    def traced(self, edits, requests, independent, maps=None):
        seen.append((len(requests), independent))
        return real(self, edits, requests, independent, maps)

    monkeypatch.setattr(Editor, "_append", traced)
    for mode in ("always", "routed"):
        make_editor("opt", replace(routed(), routing=RoutingConfig(mode=mode))).edit(make_requests("opt", 3), **QUIET)
    assert seen == [(1, False)] * 3 + [(3, True)]
