"""The editor: edits reach their targets, do not depend on each other, and leave the model as it was."""

import warnings
from dataclasses import fields, replace

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import (
    FAST,
    QUESTIONS,
    ask,
    make_editor,
    make_processor,
    make_requests,
    make_triplets,
    picture,
    routed,
)
from tests.models_tiny import MULTIMODAL, make_model
from unike_kernels.config import EncoderConfig, NeuronConfig, RoutingConfig, ShiftConfig, UnikeConfig
from unike_kernels.editing import editor as editor_module
from unike_kernels.editing import saved
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.inputs import Sample
from unike_kernels.editing.train import GroupTrainer, _spread
from unike_kernels.edits import LayerEdits

NAMES = ("opt", "llama", "blip2", "llava")
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def editors():
    """One editor a family, made once; a test that changes its config makes its own."""
    made: dict[str, Editor] = {}

    def get(name):
        if name not in made:
            made[name] = make_editor(name)
        return made[name]

    return get


def samples_of(requests):
    return [Sample(r["prompt"], r.get("target"), r.get("image")) for r in requests]


def answers(editor, requests, **kw):
    return editor.collator.generate(samples_of(requests), max_new_tokens=6, **kw)


def state_of(model):
    """Everything that an editor must leave alone."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], flags, hooks, [p.grad for p in model.parameters()]


def assert_same_state(model, before):
    after = state_of(model)
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))
    assert after[1:] == before[1:] and not uk.status(model)


def assert_close_layers(a: LayerEdits, b: LayerEdits, **tolerance):
    for f in fields(LayerEdits):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, msg=lambda m, n=f.name: f"{n}: {m}", **tolerance)


# Edits take


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


# Edits do not depend on each other


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


# The model stays as it was


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


# Requests and ids


def test_ids_are_kept_or_made_from_what_is_asked(editors):
    editor = editors("blip2")
    request = {**ask("blip2", "what is this ?", 1), "target": "moon"}
    others = [{**request, "target": "fish"}, {**request, "image": picture(2)}, {**request, "prompt": "which ?"}]

    def made(r):
        return editor_module.read_requests([r], None)[0][0].id

    assert made(request) == made(dict(request)) and len(made(request)) == 12
    assert len({made(r) for r in [request, *others]}) == 4
    assert made({**request, "id": 0}) == "0"
    assert editor.edit([{**request, "id": "mine"}], **QUIET).ids == ["mine"]


def test_the_newer_of_two_that_ask_the_same_stays(editors):
    editor = editors("blip2")
    old = {"id": "old", **ask("blip2", "what is this ?", 1), "target": "moon"}
    new = {"id": "new", **ask("blip2", "what is this ?", 1), "target": "fish"}
    other = {"id": "other", **ask("blip2", "what is this ?", 2), "target": "moon"}
    with pytest.warns(UserWarning, match="'new' replaces 'old': the same picture and prompt"):
        edits = editor.edit([old, other, new], **QUIET)
    assert edits.ids == ["other", "new"]
    with pytest.warns(UserWarning, match="'again' replaces 'new'"):
        edits = editor.edit([{**old, "id": "again"}], onto=edits, **QUIET)
    assert edits.ids == ["other", "again"] and edits.entries[1].target == "moon"
    with pytest.warns(UserWarning, match="'again' replaces 'again'"):
        assert editor.edit([{**new, "id": "again"}], onto=edits, **QUIET).ids == ["other", "again"]
    with uk.patch(editor.model, edits):
        assert answers(editor, [old, other]) == ["moon", "moon"]


def test_ids_come_once(editors):
    editor, requests = editors("blip2"), make_requests("blip2", 2)
    with pytest.raises(ValueError, match="these come twice: 'e0'"):
        editor.edit([requests[0], {**requests[1], "id": "e0"}])
    edits = editor.edit(requests[:1], **QUIET)
    with pytest.raises(ValueError, match="these come twice: 'e0'"):
        editor.edit([{**requests[1], "id": "e0"}], onto=edits)


def test_onto_must_be_this_editors(editors):
    editor = editors("llama")
    requests = make_requests("llama", 2)
    edits = editor.edit(requests[:1], **QUIET)
    other = Editor(editor.model, make_processor("llama"), routed())
    other.build_memory(make_triplets("llama", 6), **QUIET)
    other.fit()
    layers = make_editor("llama", replace(routed(), layers=(3, 4)))
    for stranger in (other, layers, editors("opt")):
        with pytest.raises(ValueError, match="another memory or other encoders"):
            stranger.edit(requests[1:], onto=edits)
    for change, named in (
        ({"neurons": replace(editor.config.neurons, beta=0.9)}, "neurons.beta: 0.1 and 0.9"),
        ({"shift": ShiftConfig(k=3)}, "shift.k: 40 and 3"),
        ({"routing": RoutingConfig()}, "routing.mode: routed and always"),
    ):
        other.states, other.fits, other.config = editor.states, editor.fits, replace(editor.config, **change)
        with pytest.raises(ValueError, match=rf"other settings \(its own, this editor's\): {named}"):
            other.edit(requests[1:], onto=edits)
    half = editor.edit(requests[1:], onto=edits.to(dtype=torch.float64), **QUIET)
    assert half.ids == ["e0", "e1"] and half.layers[4].keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"target": "moon"}, "request 1 needs a non-empty string 'prompt', but has None"),
        ({"prompt": "what", "target": "  "}, "request 1 needs a non-empty string 'target'"),
        ({"prompt": "what", "target": ["moon"]}, "request 1 needs .* but has \\['moon'\\]"),
        ({"prompt": "what", "target": "zebra", "id": 1}, "request '1': .* no token for a part of the target 'zebra'"),
        ({"prompt": "what", "target": "moon", "id": ""}, "the request of prompt 'what' has an empty id"),
        ({"prompt": "what " * 64, "target": "moon", "id": 1}, "request '1' is 67 tokens long, but .* positions for 64"),
        ("what", "request 1 must be a dict, but is 'what'"),
        (
            {"prompt": "what", "target": "moon", "imge": "cat.png"},
            "request 1 has an unknown key 'imge'; known: id, prompt, target, image",
        ),
        ({"prompt": "what \ud800", "target": "moon"}, r"request 1: prompt holds '\\ud800', which is half a character"),
        ({"prompt": "what", "target": "moon", "id": [1]}, r"the id of request 1 must be .* but is \[1\]"),
    ],
)
def test_bad_requests_are_named_before_anything_is_trained(request_, message, editors, monkeypatch):
    monkeypatch.setattr(Editor, "_append", None)
    with pytest.raises(ValueError, match=message):
        editors("opt").edit([{"prompt": "which", "target": "moon"}, request_], independent=False, **QUIET)
    with pytest.raises(ValueError, match="no requests given"):
        editors("opt").edit([])
    with pytest.raises(ValueError, match="requests must be a list of dicts, but are a dict"):
        editors("opt").edit({"prompt": "which", "target": "moon"})


def test_a_bad_picture_of_a_request_is_named_before_anything_is_trained(editors, monkeypatch, tmp_path):
    monkeypatch.setattr(Editor, "_append", None)
    good, bad = make_requests("blip2", 2)
    (tmp_path / "cut.png").write_bytes(b"no picture")
    for image in (tmp_path / "cut.png", "mistyped.png"):
        with pytest.raises((OSError, ValueError), match="request 'e1': "):
            editors("blip2").edit([good, {**bad, "image": image}], **QUIET)


def test_an_editor_prints_what_it_has(editors):
    assert repr(editors("opt")) == "Editor(OPTForCausalLM, layers [2, 4], 12 memory items, encoders fitted)"
    fresh = repr(Editor(make_model("opt"), make_processor("opt"), routed()))
    assert fresh == "Editor(OPTForCausalLM, layers [2, 4], no memory yet, no encoders yet)"


def test_inputs_of_triplets_and_cases_are_named_before_anything_is_computed(editors, monkeypatch, tmp_path):
    monkeypatch.setattr(editor_module, "Extraction", None)
    monkeypatch.setattr(editor_module, "tap_rows", None)
    editor, good = editors("blip2"), make_triplets("blip2", 2)
    (tmp_path / "cut.png").write_bytes(b"no picture")
    cut, long = {**good[1], "image": tmp_path / "cut.png"}, {**good[1], "prompt": "what " * 60}
    near = {**good[1], "prompt": "what " * 45}  # the answer that is asked of the model would not fit behind it
    for entry, message in (
        (cut, r": .*cut\.png cannot be read as a picture"),
        (long, " is 6. tokens long, but the model has positions for 64"),
        (near, " is 50 tokens long and may be answered with 24, but the model has positions for 64"),
        ({**good[1], "prompt": "<image> what ?"}, ": the prompt holds '<image>', which the Blip2Processor puts in"),
        ({**good[1], "image": "nofile.png"}, ": there is no picture 'nofile.png'"),
    ):
        with pytest.raises((OSError, ValueError), match=f"triplet 1{message}"):
            editor.build_memory([good[0], entry], **QUIET)
        if entry is not near:
            with pytest.raises((OSError, ValueError), match="calibration case 1"):
                editor.calibrate([good[0], entry], **QUIET)
    with pytest.raises(ValueError, match="the prediction of triplet 1: .* no token for a part of the target 'zebra'"):
        editor.build_memory([good[0], good[1] | {"prediction": "zebra"}], **QUIET)
    probe = {"kind": "t_loc", "prompt": "what " * 70, "target": "moon"}
    with pytest.raises(ValueError, match="probe 0 is 72 tokens long, but the model has positions for 64"):
        editor.check(None, [probe])


def test_an_unknown_key_is_refused_wherever_dicts_are_taken(editors, monkeypatch):
    """A misspelt "image" would make an edit, a memory item or a probe of text alone."""
    monkeypatch.setattr(editor_module, "Extraction", None)
    monkeypatch.setattr(editor_module, "tap_rows", None)
    editor = editors("blip2")
    odd = {"prompt": "what", "target": "moon", "picture": "cat.png"}
    calls = {
        "triplet 0": lambda: editor.build_memory([odd]),
        "sample to exclude 0": lambda: editor.build_memory(make_triplets("blip2"), exclude=[odd]),
        "calibration case 0": lambda: editor.calibrate([odd]),
        "probe 0": lambda: editor.check(None, [odd | {"kind": "rel"}]),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"{what} has an unknown key 'picture'; known: id, prompt, target, image"):
            call()


# Memory, encoders, calibration


def test_the_memory_leaves_out_what_is_edited(editors):
    editor = make_editor("blip2")
    triplets = make_triplets("blip2")
    leaked = {**triplets[2], "target": "moon", "id": "x"}
    with pytest.warns(UserWarning, match=r"already holds picture and prompt of 1 requests \(x\).*exclude=requests"):
        editor.edit([leaked], **QUIET)
    other = {**ask("blip2", triplets[3]["prompt"], 77), "target": "moon"}  # the same prompt, another picture
    states = editor.build_memory(triplets, exclude=[leaked, other], **QUIET)
    assert len(states.cases) == 11 and len(editor.triplets) == 11
    editor.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edits = editor.edit([leaked, other], **QUIET)
    assert len(edits.shared[2].h_sem) == 11
    with pytest.raises(ValueError, match="every triplet is excluded"):
        editor.build_memory(triplets[:2], exclude=triplets, **QUIET)


def test_a_memory_needs_wrong_answers(editors):
    editor = Editor(editors("opt").model, make_processor("opt"), routed())
    triplets = [{**t, "prediction": t["target"]} for t in make_triplets("opt", 3)]
    with pytest.raises(ValueError, match="answers all 3 triplets right"):
        editor.build_memory(triplets, **QUIET)
    assert editor.states is None
    with pytest.raises(ValueError, match="no triplets given"):
        editor.build_memory([])
    with pytest.raises(ValueError, match="triplet 0 needs a non-empty string 'target'"):
        editor.build_memory([{"prompt": "what", "target": ""}])


def test_the_order_of_calls_is_said():
    editor = Editor(make_model("opt"), make_processor("opt"), routed())
    for call in (editor.fit, lambda: editor.edit(make_requests("opt", 1)), lambda: editor.calibrate([])):
        with pytest.raises(ValueError, match=r"call build_memory\(triplets\) first"):
            call()
    editor.build_memory(make_triplets("opt"), **QUIET)
    with pytest.raises(ValueError, match=r"call fit\(\) first"):
        editor.edit(make_requests("opt", 1))
    editor.config = replace(routed(beta=0.0), shift=ShiftConfig(alpha=0.5))  # neither zeta nor Enc_sem is asked for
    edits = editor.edit(make_requests("opt", 1), **QUIET)
    assert edits.shared[2].encoder == ()


def test_fit_reports_and_belongs_to_its_memory(editors):
    editor = make_editor("llama")
    table = str(editor.fit())
    assert [line.split()[0] for line in table.splitlines()] == ["layer", "2", "4"]
    editor.build_memory(make_triplets("llama", 6), **QUIET)
    assert not editor.fits  # the old encoders are of another memory


@pytest.mark.parametrize("attention", ["projected", "raw"])
def test_encoders_see_what_an_item_injects(attention):
    """With alpha 1 and one item, h_know is the encoders' input: grouped heads, biases and all."""
    config = replace(routed(), shift=ShiftConfig(alpha=1.0, attention=attention, k=1))
    editor = make_editor("llama", config)
    (request,) = make_requests("llama", 1)
    edits = editor.edit([request], **QUIET)
    injected = editor.injected(2, edits.layers[2].h_pos)
    if attention == "raw":
        assert torch.equal(injected, edits.layers[2].h_pos)
        return
    for shared in edits.shared.values():
        shared.h_sem, shared.h_pos = shared.h_sem[:0], shared.h_pos[:0]
    batch = editor.collator.batch(samples_of([{**request, "target": None}]), [0])
    found = []
    with uk.patch(editor.model, edits, routing="always"), torch.no_grad():
        hook = editor.model.model.layers[2].self_attn.register_forward_hook(lambda m, a, out: found.append(out[0]))
        editor.model(**batch.inputs)
        hook.remove()
    torch.testing.assert_close(found[0][0], injected.expand_as(found[0][0]), rtol=1e-4, atol=1e-5)


def test_w_zeta_trained_over_edits():
    config = replace(routed(), encoders=EncoderConfig(steps=20, w_zeta="trained", w_zeta_edits=6))
    editor = make_editor("blip2", config)
    plain = make_editor("blip2")
    for i in editor.layers:
        fit = editor.fits[i]
        torch.testing.assert_close(fit.zeta_prime, fit.w_zeta @ fit.zeta)
        assert torch.equal(fit.zeta, plain.fits[i].zeta) and fit.zeta_prime.isfinite().all()
        assert fit.zeta_prime.norm() > 1e-3 and not torch.equal(fit.zeta_prime, plain.fits[i].zeta_prime)
    assert editor.edit(make_requests("blip2", 2), **QUIET).entries[0].success


def test_zeta_prime_is_shared_unless_it_is_learned(editors):
    for lr, same in ((0.0, True), (1e-2, False)):
        editor = make_editor("opt", routed(lr_zeta=lr))
        edits = editor.edit(make_requests("opt", 2), **QUIET)
        for i in editor.layers:
            wanted = editor.fits[i].zeta_prime.expand(2, -1)
            assert torch.equal(edits.layers[i].zeta, wanted) is same


def test_calibration_cases_add_up(editors):
    editor = make_editor("blip2")
    cases = [ask("blip2", QUESTIONS[i % 3], None if i == 1 else 50 + i) for i in range(3)]
    editor.calibrate(cases)
    editor.calibrate(cases[:1])
    assert editor.cases is not None and len(editor.cases) == 12 + 3 + 1
    torch.testing.assert_close(editor.cases[-1], editor.cases[12], rtol=1e-4, atol=1e-5)
    own = editor.own_items([Sample(cases[1]["prompt"], "moon", None)])
    torch.testing.assert_close(editor.cases[13][None], own[2][0], rtol=1e-4, atol=1e-5)
    calibration = editor.edit(make_requests("blip2", 1), **QUIET).calibration
    assert calibration is not None and calibration.layer == 2 and torch.equal(calibration.cases, editor.cases)
    assert editor.states is not None
    torch.testing.assert_close(calibration.center, editor.states.layers[2].h_sem.mean(dim=0))


@pytest.mark.parametrize(("layers", "used"), [((4, 2), (2, 4)), ((3, 3), (3,)), (None, (1, 2, 3, 4))])
def test_layers(layers, used):
    editor = make_editor("llama", replace(routed(), layers=layers))
    edits = editor.edit(make_requests("llama", 2), **QUIET)
    assert editor.layers == tuple(edits.layers) == used and all(e.success for e in edits.entries)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match=r"layers \[5\] must be some of 0 to 4"):
        Editor(make_model("llama"), make_processor("llama"), UnikeConfig(layers=(5,)))


def test_own_items_and_the_training_patch_may_be_overridden():
    class Traced(Editor):
        def own_items(self, samples):
            return {i: (sem, torch.ones_like(pos)) for i, (sem, pos) in super().own_items(samples).items()}

        def training_patch(self, edits, max_neurons):
            handle = super().training_patch(edits, max_neurons)
            patches.append((len(edits), max_neurons, handle))
            return handle

    patches: list = []
    editor = Traced(make_model("opt"), make_processor("opt"), routed())
    editor.build_memory(make_triplets("opt"), **QUIET)
    editor.fit()
    edits = editor.edit(make_requests("opt", 2), independent=False, **QUIET)
    assert [p[:2] for p in patches] == [(1, 10), (2, 20)]
    assert all((layer.h_pos == 1).all() for layer in edits.layers.values())


def test_progress_goes_to_stderr_and_can_be_left_out(editors, capsys):
    editor = make_editor("opt")
    steps = {
        f"{len(editor.layers)}/{len(editor.layers)}": editor.fit,
        "3/3": lambda progress: editor.calibrate(make_requests("opt", 3), progress=progress),
        "2/2": lambda progress: editors("opt").edit(make_requests("opt", 2), progress=progress),
    }
    for done, step in steps.items():
        for progress in (True, False):
            step(progress=progress)
            out, err = capsys.readouterr()
            assert out == "" and (done in err) is progress and bool(err) is progress


# A saved editor


@pytest.mark.parametrize("name", ["llama", "blip2"])
def test_a_saved_editor_makes_the_same_edits(name, tmp_path, editors):
    editor = make_editor(name)
    editor.calibrate([ask(name, "what ?", 7)])
    path = tmp_path / "folder" / "editor.safetensors"
    editor.save(path)
    loaded = Editor(make_model(name), make_processor(name), routed())
    loaded.load(path)
    requests = make_requests(name, 2)
    a, b = editor.edit(requests, **QUIET), loaded.edit(requests, **QUIET)
    assert a.entries == b.entries and str(loaded.fits) == str(editor.fits)
    for x, y in zip(a.named_tensors().values(), b.named_tensors().values(), strict=True):
        assert torch.equal(x, y)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert str(loaded.fit()) == str(editor.fits)  # the states are all there
    with pytest.warns(UserWarning, match="already holds picture and prompt of 1 requests"):
        loaded.edit([{**make_triplets(name)[0], "id": "x"}], **QUIET)
    assert [p.name for p in path.parent.iterdir()] == ["editor.safetensors"]


def test_another_editors_state_is_refused(tmp_path, editors):
    path = tmp_path / "editor.safetensors"
    editors("blip2").save(path)
    other_weights = make_model("blip2", seed=1)
    for model, config, message in (
        (make_model("opt"), routed(), "other weights"),  # the language model of the same sizes
        (other_weights, routed(), "other weights"),
        (make_model("llama"), routed(), "family: 'opt' and 'llama'"),
        (make_model("blip2"), replace(routed(), layers=(1, 4)), r"layers: \[2, 4\] and \[1, 4\]"),
        (make_model("blip2"), replace(routed(), encoders=EncoderConfig(steps=3)), "encoders: .*steps=20.*steps=3"),
        (make_model("blip2"), replace(routed(), shift=ShiftConfig(attention="raw")), "attention: projected and raw"),
    ):
        name = "llama" if "Llama" in type(model).__name__ else "opt"
        editor = Editor(model, make_processor("blip2" if "Blip2" in type(model).__name__ else name), config)
        with pytest.raises(ValueError, match=message):
            editor.load(path)
        assert editor.states is None and not editor.fits
    trained = Editor(make_model("blip2"), make_processor("blip2"), routed(beta=0.5))  # no part of what was saved
    trained.load(path)
    trained.config = replace(trained.config, encoders=replace(FAST, w_zeta="trained"))
    with pytest.raises(ValueError, match="no pictures to train W_zeta on"):
        trained.fit()


SAID = {
    "format": "it has format 9, but this package reads format 1",
    "no format": "it has no 'format_version'",
    "no states": "it has no 'states.2.h_sem'",
}


@pytest.mark.parametrize("damage", ["cut", "other", "format", "no format", "no states"])
def test_a_damaged_editor_is_refused(damage, tmp_path, editors):
    path = tmp_path / "editor.safetensors"
    editors("blip2").save(path)
    good = path.read_bytes()
    names = {
        "format": (b'\\"format_version\\": 1', b'\\"format_version\\": 9'),
        "no format": (b"format_version", b"format_vision_"),
        "no states": (b"states.2.h_sem", b"states.2.h_pem"),
    }
    if damage in names:
        path.write_bytes(good.replace(*names[damage]))
    else:
        path.write_bytes(good[:-50] if damage == "cut" else b"{}" * 40)
    editor = Editor(make_model("blip2"), make_processor("blip2"), routed())
    with pytest.raises(
        ValueError, match=f"editor.safetensors is not a saved editor, or is damaged: {SAID.get(damage, '')}"
    ):
        editor.load(path)
    with pytest.raises(FileNotFoundError):
        editor.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="call build_memory"):
        editor.save(tmp_path / "empty")


def test_a_failed_save_keeps_the_file_of_before(tmp_path, editors, monkeypatch):
    path = tmp_path / "editor.safetensors"
    editors("blip2").save(path)
    good = path.read_bytes()

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(saved, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        editors("blip2").save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == [path.name]


# Where neurons start


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


# check


def make_probes():
    (request,) = make_requests("blip2", 1)
    asked = {"prompt": request["prompt"], "target": request["target"], "image": request["image"]}
    return request, [
        {"kind": "rel", **asked},
        {"kind": "t_gen", **asked, "prompt": "which thing do you see ?"},
        {"kind": "m_gen", **asked, "image": picture(9)},
        {"kind": "t_loc", "prompt": "what is the moon ?", "target": "star"},
        {"kind": "m_loc", **ask("blip2", "which one is old ?", 8), "target": "house"},
    ]


def test_check_reports_the_five_metrics(editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    report = editor.check(edits, probes)
    assert report.before == {"rel": 0.0, "t_gen": 0.0, "m_gen": 0.0, "t_loc": 100.0, "m_loc": 100.0}
    assert report.metrics["rel"] == report.exact["rel"] == 100.0
    assert report.metrics["mean"] == pytest.approx(sum(report.metrics[k] for k in report.before) / 5)
    assert report.locality_b.keys() == {"t_loc", "m_loc"}
    rel, *_, m_loc = report.rows
    assert rel.answer_after == request["target"] != rel.answer_before and rel.locality_b is None
    assert m_loc.answer_before == answers(editor, [probes[-1]])[0][: len(m_loc.answer_before)] and m_loc.before == 1.0
    assert editor.check(edits, probes) == report
    head, before, after, *_, counts = str(report).splitlines()
    assert head.split() == ["percent", "rel", "t_gen", "m_gen", "t_loc", "m_loc", "mean"]
    assert before.split() == ["before", "0.0", "0.0", "0.0", "100.0", "100.0"]
    assert after.split()[1] == "100.0" and counts.split() == ["probes", "1", "1", "1", "1", "1"]


def test_check_of_always_on_edits_and_of_some_kinds(editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    report = editor.check(edits, [probes[0], probes[3], probes[4]], routing="always")
    assert report.metrics.keys() == {"rel", "t_loc", "m_loc"} and report.metrics["rel"] == 100.0
    assert min(report.metrics["t_loc"], report.metrics["m_loc"], *report.locality_b.values()) < 100.0
    assert str(report).splitlines()[1].split() == ["before", "0.0", "100.0", "100.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "reliability"}, "probe 4 needs a kind of rel, t_gen, m_gen, t_loc, m_loc, but has 'reliability'"),
        ({"target": ""}, "probe 4 needs a non-empty string 'target'"),
        ({"prompt": None}, "probe 4 needs a non-empty string 'prompt'"),
    ],
)
def test_bad_probes_are_named(change, message, editors):
    editor = editors("blip2")
    request, probes = make_probes()
    edits = editor.edit([request], **QUIET)
    with pytest.raises(ValueError, match=message):
        editor.check(edits, [*probes[:4], {**probes[4], **change}])


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
