"""What an editor has besides its edits: memory, encoders, calibration, layers; saved and taken up again."""

import warnings
from dataclasses import replace

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
    routed,
    samples_of,
)
from tests.models_tiny import make_model
from unike_kernels.config import EncoderConfig, ShiftConfig, UnikeConfig
from unike_kernels.editing import saved
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.inputs import Sample

QUIET = {"progress": False}


def test_an_editor_prints_what_it_has(editors):
    assert repr(editors("opt")) == "Editor(OPTForCausalLM, layers [2, 4], 12 memory items, encoders fitted)"
    fresh = repr(Editor(make_model("opt"), make_processor("opt"), routed()))
    assert fresh == "Editor(OPTForCausalLM, layers [2, 4], no memory yet, no encoders yet)"


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


DAMAGED = "is not a saved editor, or is damaged: "
SAID = {
    "format": "has format 9, but this package reads format 1",
    "no format": f"{DAMAGED}it has no 'format_version'",
    "no states": f"{DAMAGED}it has no 'states.2.h_sem'",
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
    with pytest.raises(ValueError, match=f"editor.safetensors {SAID.get(damage, DAMAGED)}"):
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
