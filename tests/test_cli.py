"""The command line, as a user runs it."""

import json

import pytest
from typer.testing import CliRunner

import unike_kernels as uk
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from bench.quality.emoji.data import DRAWINGS
from tests.factories import make_edits
from unike_kernels.cli import app

runner = CliRunner()


def test_info_names_every_backend():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert uk.__version__ in result.output
    for backend in uk.backends.available():
        assert f"backend {backend.name}:" in result.output


def test_inspect_lists_every_edit(tmp_path):
    edits = make_edits(n_edits=12)
    edits.save_pretrained(tmp_path / "edits")
    result = runner.invoke(app, ["inspect", str(tmp_path / "edits")])
    assert result.exit_code == 0
    assert all(i in result.output for i in edits.ids)
    assert "K = 40" in result.output


def test_help_shows_an_example():
    for command in ("info", "inspect", "edit"):
        assert f"Example: unike-kernels {command}" in runner.invoke(app, [command, "--help"]).output


@pytest.fixture
def job(tmp_path):
    """A model folder, requests and triplets on disk."""
    net, processor = emoji.make_model(0), emoji.make_processor()
    net.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    record = records.records("development", "name", 1)[0]
    root = tmp_path / "data"
    root.mkdir()

    def named(image):
        (root / image).parent.mkdir(exist_ok=True)
        (root / image).write_bytes((DRAWINGS / image).read_bytes())
        return image

    request = {"id": "one", "prompt": record["src"], "target": record["alt"], "image": named(record["image"])}
    known = [{**t, "image": named(t["image"]), "prediction": "a duck"} for t in records.triplets()[:80:8]]
    (root / "requests.json").write_text(json.dumps([request]))
    (root / "triplets.json").write_text(json.dumps(known))
    return tmp_path, root


def test_edit_writes_edits_that_load(job):
    folder, root = job
    args = ["edit", str(folder / "model"), str(root / "requests.json"), str(folder / "out")]
    result = runner.invoke(app, [*args, "--triplets", str(root / "triplets.json")])
    assert result.exit_code == 0, result.output
    edits = uk.Edits.from_pretrained(folder / "out")
    assert edits.ids == ["one"]
    assert "one" in result.output


def test_missing_pictures_are_counted_and_named(job):
    folder, root = job
    asked = json.loads((root / "requests.json").read_text())
    (root / asked[0]["image"]).unlink()
    args = ["edit", str(folder / "model"), str(root / "requests.json"), str(folder / "out")]
    result = runner.invoke(app, [*args, "--triplets", str(root / "triplets.json")])
    assert result.exit_code != 0
    assert "1 of 1 pictures" in result.output
    assert not (folder / "out").exists()
