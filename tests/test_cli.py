"""The command line, as a user runs it."""

import json
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import transformers
from typer.testing import CliRunner

import unike_kernels as uk
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from bench.quality.emoji.data import DRAWINGS
from tests.factories import make_edits
from unike_kernels import cli, native
from unike_kernels.cli import app

runner = CliRunner()


def test_info_names_every_backend():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert uk.__version__ in result.output
    for backend in uk.backends.available():
        assert f"backend {backend.name}:" in result.output


def test_info_tells_triton_gpus_and_native_modules(monkeypatch):
    monkeypatch.setattr(cli, "version", lambda package: {"triton": "3.6.1"}[package])
    monkeypatch.setattr(cli, "_gpus", lambda: ["GPU 0: some GPU"])
    monkeypatch.setattr(native, "no_cpu", lambda: None)
    monkeypatch.setattr(native, "no_cuda", lambda device=None: "it was left out")
    lines = runner.invoke(app, ["info"]).output.splitlines()
    assert "triton 3.6.1" in lines
    assert "GPU 0: some GPU" in lines
    assert "native CPU module: usable" in lines
    assert "native CUDA module: it was left out" in lines


def test_info_without_triton_and_without_a_gpu(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(cli, "version", missing)
    monkeypatch.setattr(cli, "_gpus", list)
    lines = runner.invoke(app, ["info"]).output.splitlines()
    assert "triton is not installed" in lines
    assert "no GPU that this torch can use" in lines


def test_every_gpu_is_named_with_its_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, i))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"H20{i}")
    told = subprocess.CompletedProcess([], 0, stdout="580.1\n580.1\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: told)
    assert cli._gpus() == [
        "GPU 0: H200, compute capability 9.0, driver 580.1",
        "GPU 1: H201, compute capability 9.1, driver 580.1",
    ]

    def missing(*args, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert cli._gpus()[0].endswith("driver unknown")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tune_without_a_gpu_says_so_and_writes_nothing(tmp_path):
    result = runner.invoke(app, ["tune", "--out", str(tmp_path / "rows.json")])
    assert result.exit_code == 1
    assert "nothing to tune here: there is no CUDA device" in result.output
    assert not list(tmp_path.iterdir())


def test_inspect_lists_every_edit(tmp_path):
    edits = make_edits(n_edits=12)
    edits.save_pretrained(tmp_path / "edits")
    result = runner.invoke(app, ["inspect", str(tmp_path / "edits")])
    assert result.exit_code == 0
    assert all(i in result.output for i in edits.ids)
    assert "K = 40" in result.output


def test_inspect_of_edits_whose_model_has_no_name(tmp_path):
    edits = make_edits()
    edits.base = replace(edits.base, name_or_path=None)
    edits.save_pretrained(tmp_path / "edits")
    lines = runner.invoke(app, ["inspect", str(tmp_path / "edits")]).output.splitlines()
    assert lines[0] == "base: opt, hidden size 8, 6 layers, of a model without a name"


def test_the_version_alone():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"unike-kernels {uk.__version__}\n")


def test_help_fits_a_narrow_terminal(monkeypatch):
    """What options take is named so shortly that their help keeps half of the line, and nothing of it is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("edit", "evaluate"):
        text = runner.invoke(app, [command, "--help"]).output
        assert "\u2026" not in text, text


def test_a_model_that_is_no_folder_is_told(job, monkeypatch):
    folder, root = job
    monkeypatch.chdir(folder)

    def unknown(name):
        raise OSError(f"no repository {name}")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unknown)
    args = ["edit", "nomodel", str(root / "requests.json"), str(folder / "out")]
    result = runner.invoke(app, [*args, "--triplets", str(root / "triplets.json")])
    assert result.exit_code == 1
    assert f"there is no folder 'nomodel' in {folder}, nor can a hub's model be had: no repo" in result.output
    assert not (folder / "out").exists()


def test_help_shows_an_example():
    for command in ("info", "inspect", "edit", "evaluate", "tune"):
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
    known = [
        {"prompt": t["prompt"], "target": t["target"], "image": named(t["image"]), "prediction": "a duck"}
        for t in records.triplets()[:80:8]
    ]
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
