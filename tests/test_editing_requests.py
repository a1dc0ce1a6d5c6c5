"""What an editor is asked: ids, repetitions, and everything that it refuses before anything is computed."""

from dataclasses import replace

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import (
    answers,
    ask,
    make_editor,
    make_processor,
    make_requests,
    make_triplets,
    picture,
    routed,
)
from tests.models_tiny import make_model
from unike_kernels.config import RoutingConfig, ShiftConfig
from unike_kernels.editing import editor as editor_module
from unike_kernels.editing.editor import Editor

QUIET = {"progress": False}


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
