"""`unike-kernels edit`: what is there stays, what is missing is made, what is wrong is told before computing."""

import json
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import unike_kernels as uk
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from bench.quality.emoji.data import DRAWINGS
from unike_kernels.cli import app
from unike_kernels.editing import making
from unike_kernels.editing.inputs import Collator


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A model's folder, and files of two requests, of triplets and of probes with their pictures."""
    folder = tmp_path_factory.mktemp("making")
    net, processor = emoji.make_model(0), emoji.make_processor()
    net.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    def named(image):
        (folder / image).parent.mkdir(exist_ok=True)
        (folder / image).write_bytes((DRAWINGS / image).read_bytes())
        return image

    found = records.records("development", "name", 3)
    requests = [
        {"id": f"r{n}", "prompt": r["src"], "target": r["alt"], "image": named(r["image"])} for n, r in enumerate(found)
    ]
    known = [
        {"prompt": t["prompt"], "target": t["target"], "image": named(t["image"]), "prediction": "a duck"}
        for t in records.triplets()[:80:8]
    ]
    probes = [
        {"kind": kind, "prompt": r["prompt"], "target": r["target"], "image": r["image"]}
        for kind, r in zip(("rel", "m_loc"), requests, strict=False)
    ]
    for name, content in (("requests", requests[:2]), ("three", requests), ("triplets", known), ("probes", probes)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"neurons": {"steps": 3}, "encoders": {"steps": 5}}))
    return folder


@pytest.fixture
def edit(ready, tmp_path):
    """Runs the command into tmp_path/out with a cache of its own; further options as given."""

    def run(*options, requests="requests.json", triplets="triplets.json", out="out", model="model"):
        args = ["edit", str(ready / model), str(ready / requests), str(tmp_path / out)]
        args += ["--triplets", str(ready / triplets), "--config", str(ready / "config.json")]
        return CliRunner().invoke(app, [*args, "--cache", str(tmp_path / "cache"), *options])

    return run


def same(a, b):
    """Whether two folders hold the same edits, bit for bit."""
    a, b = (uk.Edits.from_pretrained(x) for x in (a, b))
    ours, theirs = a.named_tensors(), b.named_tensors()
    return (
        a.entries == b.entries
        and ours.keys() == theirs.keys()
        and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    )


def test_the_same_command_again_makes_nothing_and_changes_nothing(edit, tmp_path, monkeypatch):
    first = edit()
    assert first.exit_code == 0, first.output
    assert "edits made: 2\n" in first.output
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    monkeypatch.setattr(making, "load", None)  # the model is not even loaded
    again = edit()
    assert again.exit_code == 0, again.output
    assert "edits made: 0; requests whose edit was there, or that a later one replaces: 2" in again.output
    assert same(tmp_path / "out", tmp_path / "before")


@pytest.mark.parametrize("routed", [False, True])
def test_new_requests_join_the_edits_that_are_there(edit, tmp_path, routed):
    option = "--routed" if routed else "--always"
    assert edit(option).exit_code == 0
    before = uk.Edits.from_pretrained(tmp_path / "out")
    result = edit(option, requests="three.json")
    assert "edits made: 1; requests whose edit was there, or that a later one replaces: 2" in result.output, (
        result.output
    )
    assert "memory and encoders as saved in" in result.output
    after = uk.Edits.from_pretrained(tmp_path / "out")
    assert after.ids == ["r0", "r1", "r2"]
    assert after.config.routing.mode == ("routed" if routed else "always")
    kept = after.select(["r0", "r1"]).named_tensors()
    assert all(torch.equal(t, kept[n]) for n, t in before.named_tensors().items())


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(edit, tmp_path, monkeypatch):
    assert edit(requests="three.json", out="whole").exit_code == 0
    monkeypatch.setattr(making, "SAVED_EVERY", 1)
    train, calls = making.Editor.edit, []

    def stopped(self, part, **options):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, part, **options)

    monkeypatch.setattr(making.Editor, "edit", stopped)
    assert edit(requests="three.json").exit_code != 0
    assert uk.Edits.from_pretrained(tmp_path / "out").ids == ["r0", "r1"]  # what was made is kept
    monkeypatch.setattr(making.Editor, "edit", train)
    result = edit(requests="three.json")
    assert "edits made: 1;" in result.output, result.output
    assert same(tmp_path / "out", tmp_path / "whole")


def test_a_request_replaces_the_edit_that_asks_the_same(edit, ready, tmp_path):
    assert edit().exit_code == 0
    asked = json.loads((ready / "requests.json").read_text())
    (ready / "other.json").write_text(json.dumps([asked[0] | {"target": "a red duck"}]))
    result = edit(requests="other.json")
    assert result.exit_code == 0, result.output
    assert "warning: request 'r0' replaces 'r0': the same picture and prompt\n" in result.output
    assert "making.py" not in result.output
    entries = {e.id: e.target for e in uk.Edits.from_pretrained(tmp_path / "out").entries}
    assert entries == {"r1": asked[1]["target"], "r0": "a red duck"}


def test_probes_are_asked_and_told(edit, ready):
    result = edit("--probes", str(ready / "probes.json"))
    assert result.exit_code == 0, result.output
    table = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert table["probes"] == ["probes", "1", "1"]
    assert len(table["after"]) == 3  # Rel and M-Loc
    assert "rel: " in result.output  # after three steps of training the answer is still another one
    assert "is answered" in result.output


def test_triplets_that_ask_what_is_edited_or_probed_are_left_out(edit, ready, tmp_path):
    known = json.loads((ready / "triplets.json").read_text())
    asked = json.loads((ready / "requests.json").read_text())
    (ready / "more.json").write_text(json.dumps([*known, {**asked[0], "prediction": "a duck", "id": None}]))
    result = edit(triplets="more.json")
    assert result.exit_code == 0, result.output
    assert "1 of 11 triplets ask what is edited or probed and are left out" in result.output


def test_a_folder_that_another_process_writes_to_is_left_alone(edit, tmp_path, monkeypatch):
    assert edit(requests="three.json", out="other").exit_code == 0
    train = making.Editor.edit

    def meanwhile(self, part, **options):
        shutil.copytree(tmp_path / "other", tmp_path / "out")
        return train(self, part, **options)

    monkeypatch.setattr(making.Editor, "edit", meanwhile)
    result = edit()
    assert result.exit_code == 1
    assert "was written to by another process meanwhile" in result.output
    assert same(tmp_path / "out", tmp_path / "other")


OTHER = {
    "memory": ({"triplets": "fewer.json"}, (), "another memory or other encoders (items there, here: (10, 9))"),
    "beta": ({}, ("--config", "beta.json"), "cannot join (there, here): neurons.beta: 0.1 and 0.9"),
    "routing": ({}, ("--routed",), "cannot join (there, here): routing.mode: always and routed"),
}


@pytest.mark.parametrize(
    ("what", "requests"),  # where nothing is left to make, the triplets are not made into a memory
    [("memory", "three.json"), *((what, f"{n}.json") for what in ("beta", "routing") for n in ("requests", "three"))],
)
def test_edits_made_otherwise_are_refused_and_stay(edit, ready, tmp_path, monkeypatch, what, requests):
    files, options, told = OTHER[what]
    assert edit().exit_code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    known = json.loads((ready / "triplets.json").read_text())
    (ready / "fewer.json").write_text(json.dumps(known[:-1]))
    config = json.loads((ready / "config.json").read_text())
    (ready / "beta.json").write_text(json.dumps(config | {"neurons": config["neurons"] | {"beta": 0.9}}))
    options = [str(ready / o) if o.endswith(".json") else o for o in options]
    if not files:
        monkeypatch.setattr(making, "load", None)  # settings are compared before the model is loaded
    result = edit(*options, requests=requests, **files)
    assert result.exit_code == 1
    assert told in result.output
    assert same(tmp_path / "out", tmp_path / "before")


def test_a_kept_memory_that_holds_what_is_asked_is_told(edit, ready):
    known = json.loads((ready / "triplets.json").read_text())
    asked = [{"kind": "rel", **{key: t[key] for key in ("prompt", "target", "image")}} for t in known[:3]]
    (ready / "known.json").write_text(json.dumps(asked))
    assert "left out" not in edit().output
    told = edit("--probes", str(ready / "known.json"), requests="three.json")
    assert told.exit_code == 0 and "3 of its items ask what is edited or probed, so scores of it are" in told.output
    assert "of its items" not in edit("--probes", str(ready / "probes.json"), out="b").output


@pytest.fixture(scope="module")
def other(ready):
    """The folder of a model of the same sizes with other weights."""
    net = emoji.make_model(1)
    net.save_pretrained(ready / "other")
    emoji.make_processor().save_pretrained(ready / "other")
    return ready / "other"


@pytest.mark.parametrize("requests", ["requests.json", "three.json"], ids=["nothing left", "one left"])
def test_edits_of_another_model_are_refused_before_the_memory_is_built(
    edit, other, tmp_path, monkeypatch, ready, requests
):
    assert edit().exit_code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    monkeypatch.setattr(making.Editor, "build_memory", None)
    monkeypatch.setattr(making.Editor, "check", None)
    for options in ((), ("--probes", str(ready / "probes.json"))):
        result = edit(*options, requests=requests, model="other")
        assert result.exit_code == 1
        assert f"a sampled probe of '{ready / 'model'}' and of '{other}' differs" in result.output
    assert same(tmp_path / "out", tmp_path / "before")


def test_the_same_model_under_another_name_is_taken(edit, ready, tmp_path):
    assert edit().exit_code == 0
    shutil.copytree(ready / "model", ready / "moved", dirs_exist_ok=True)
    result = edit(model="moved")
    assert result.exit_code == 0
    assert "edits made: 0" in result.output


def test_a_memory_in_another_dtype_is_another_memory(edit, ready, tmp_path):
    emoji.make_model(0).bfloat16().save_pretrained(ready / "half")  # so rounded that the probe cannot tell
    emoji.make_processor().save_pretrained(ready / "half")
    for dtype in ("bfloat16", "float32"):
        result = edit("--dtype", dtype, model="half", out=dtype)
        assert result.exit_code == 0, result.output
        assert "memory and encoders as saved in" not in result.output
    half, single = (uk.Edits.from_pretrained(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    assert not torch.equal(half.shared[5].h_sem, single.shared[5].h_sem)


# Ids


def numbered(ready, monkeypatch, order, targets=None):
    """A file of requests whose ids are their places; edits are made one by one, each saved."""
    monkeypatch.setattr(making, "SAVED_EVERY", 1)
    found = json.loads((ready / "three.json").read_text())
    asked = [
        found[i] | {"id": str(n), "target": (targets or {}).get(i, found[i]["target"])} for n, i in enumerate(order)
    ]
    (ready / "numbered.json").write_text(json.dumps(asked))
    return "numbered.json"


def test_edits_take_the_new_ids_of_their_requests(edit, ready, tmp_path, monkeypatch):
    assert edit(requests=numbered(ready, monkeypatch, (0, 1))).exit_code == 0
    before = uk.Edits.from_pretrained(tmp_path / "out")
    result = edit(requests=numbered(ready, monkeypatch, (2, 0, 1)))
    assert result.exit_code == 0, result.output
    assert "edits made: 1; requests whose edit was there, or that a later one replaces: 2" in result.output
    after = uk.Edits.from_pretrained(tmp_path / "out")
    assert after.ids == ["1", "2", "0"]
    kept = after.select(["1", "2"])
    assert [e.prompt for e in kept.entries] == [e.prompt for e in before.entries]
    assert all(torch.equal(t, kept.named_tensors()[n]) for n, t in before.named_tensors().items())
    monkeypatch.setattr(making, "load", None)  # new ids alone: nothing is made, and the folder has them all the same
    assert edit(requests=numbered(ready, monkeypatch, (0, 2, 1))).exit_code == 0
    assert uk.Edits.from_pretrained(tmp_path / "out").ids == ["0", "2", "1"]


def test_ids_that_change_places_while_edits_are_replaced(edit, ready, tmp_path, monkeypatch):
    """Each request has the id of an edit that only a later part replaces; stopped in between, none is lost."""
    assert edit(requests=numbered(ready, monkeypatch, (0, 1, 2))).exit_code == 0
    before = uk.Edits.from_pretrained(tmp_path / "out")
    train, calls = making.Editor.edit, []

    def stopped(self, part, **options):
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, part, **options)

    monkeypatch.setattr(making.Editor, "edit", stopped)
    asked = numbered(ready, monkeypatch, (1, 2, 0), dict.fromkeys(range(3), "a red duck"))
    assert edit(requests=asked).exit_code != 0
    halfway = uk.Edits.from_pretrained(tmp_path / "out")
    assert sorted(e.prompt for e in halfway.entries) == sorted(e.prompt for e in before.entries)
    assert sum(e.target == "a red duck" for e in halfway.entries) == 1
    monkeypatch.setattr(making.Editor, "edit", train)
    result = edit(requests=asked)
    assert result.exit_code == 0, result.output
    assert "edits made: 2;" in result.output
    made = {e.id: (e.image, e.target) for e in uk.Edits.from_pretrained(tmp_path / "out").entries}
    images = [e.image for e in before.entries]
    assert made == {str(n): (images[i], "a red duck") for n, i in enumerate((1, 2, 0))}


# Bad input


def test_edits_of_other_layers_are_refused_before_the_memory_is_built(edit, ready, tmp_path, monkeypatch):
    assert edit().exit_code == 0
    monkeypatch.setattr(making.Editor, "build_memory", None)
    (ready / "layers.json").write_text(json.dumps({"layers": [0, 1], "neurons": {"steps": 3}}))
    result = edit("--config", str(ready / "layers.json"), requests="three.json")
    assert result.exit_code == 1
    assert "layers: [2, 3, 4, 5] and [0, 1]" in result.output


WRONG = {
    "no target": ([{"prompt": "a"}], "request 0 needs a non-empty string 'target', but has None"),
    "no list": ({"prompt": "a"}, "must hold a JSON list of objects"),
    "no path": ([{"prompt": "a", "target": "b", "image": 3}], "the image of entry 0 must be a path or null, but is 3"),
    "no picture": ([{"prompt": "a", "target": "b", "image": "x.png"}], "1 of 1 pictures are missing"),
    "nothing": ([], "no requests given"),
    "unknown key": (
        [{"prompt": "a", "target": "b", "imge": "x.png"}],
        "request 0 has an unknown key 'imge'; known: id, prompt, target, image",
    ),
    "no name": (
        [{"prompt": "a", "target": "b", "image": ""}],
        "the image of entry 0 must be a path or null, but is ''",
    ),
    "half a character": ([{"prompt": "a\ud800", "target": "b"}], "request 0: prompt holds '\\ud800'"),
    "one id twice": ([{"prompt": p, "target": "b", "id": "x"} for p in "ac"], "these come twice: 'x'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_requests_are_told_before_the_model_is_loaded(edit, ready, tmp_path, monkeypatch, name):
    content, told = WRONG[name]
    monkeypatch.setattr(making, "load", None)
    (ready / "wrong.json").write_text(json.dumps(content))
    result = edit(requests="wrong.json")
    assert result.exit_code == 1
    assert told in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_told_before_the_model_is_loaded(edit, ready, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "load", None)
    (ready / "wrong.json").write_text("[{")
    assert "wrong.json is not JSON" in edit(requests="wrong.json").output
    assert "wrong.json is not JSON" in edit("--config", str(ready / "wrong.json")).output
    (ready / "wrong.json").write_text("[" * 100_000)
    assert "wrong.json is not JSON" in edit(requests="wrong.json").output
    assert "wrong.json is not JSON" in edit("--config", str(ready / "wrong.json")).output
    (ready / "wrong.json").write_text(json.dumps({"neuron": {}}))
    told = "wrong.json: unknown keys in the config: neuron; known: layers, shift, routing, encoders, neurons"
    assert told in edit("--config", str(ready / "wrong.json")).output
    for option, key in (("--triplets", "picture"), ("--probes", "img")):
        (ready / "wrong.json").write_text(json.dumps([{"prompt": "a", "target": "b", key: "x.png"}]))
        assert f"{option[2:-1]} 0 has an unknown key '{key}'" in edit(option, str(ready / "wrong.json")).output
    (ready / "wrong.json").write_text(json.dumps([{"prompt": "a", "target": "b", "kind": "reliability"}]))
    assert "probe 0 needs a kind of rel, t_gen" in edit("--probes", str(ready / "wrong.json")).output
    (tmp_path / "out").write_text("a file")
    assert "edits are saved into a folder, but" in edit().output
    assert (tmp_path / "out").read_text() == "a file"


def test_a_target_without_tokens_is_told_before_the_memory_is_built(edit, monkeypatch):
    def no_token(self, prompt, target):
        raise ValueError(f"the tokenizer has no token for the target {target!r}")

    monkeypatch.setattr(making.Editor, "build_memory", None)
    monkeypatch.setattr(Collator, "target_ids", no_token)
    result = edit()
    assert result.exit_code == 1
    assert "request 0: the tokenizer has no token for the target 'crutch'" in result.output


@pytest.mark.parametrize("wrong", ["damaged", "huge", "long"])
@pytest.mark.parametrize("what", ["request", "triplet", "probe"])
def test_what_the_model_cannot_take_is_told_before_anything_is_computed(edit, ready, monkeypatch, what, wrong):
    for name in ("build_memory", "edit", "check"):
        monkeypatch.setattr(making.Editor, name, None)
    entries = json.loads((ready / f"{what}s.json").read_text())
    (ready / "damaged.png").write_bytes((ready / entries[0]["image"]).read_bytes()[:60])
    Image.new("1", (400, 400)).save(ready / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    change = {"prompt": "what is this " * 100} if wrong == "long" else {"image": f"{wrong}.png"}
    (ready / "wrong.json").write_text(
        json.dumps([*entries, {k: v for k, v in entries[0].items() if k != "id"} | change])
    )
    file = ready / "wrong.json"
    result = edit(requests=file) if what == "request" else edit(f"--{what}s", str(file))
    assert result.exit_code == 1
    name = f"{what} {len(entries)}"
    told = f"{name} is " if wrong == "long" else f"{name}: {ready / wrong}.png cannot be read as a picture: "
    assert told in result.output
    assert wrong != "long" or "but the model has positions for 96" in result.output


def test_an_id_of_an_edit_that_stays_is_refused(edit, ready, tmp_path, monkeypatch):
    assert edit().exit_code == 0
    monkeypatch.setattr(making, "load", None)
    (ready / "wrong.json").write_text(json.dumps([{"id": "r0", "prompt": "something else?", "target": "duck"}]))
    result = edit(requests="wrong.json")
    assert result.exit_code == 1
    assert "edit ids must be unique, but these come twice: 'r0'" in result.output
