"""The quality benchmark's command, and edits per second."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch
from typer.testing import CliRunner

from bench.quality import cells, run, speed, world
from bench.quality.rows import ROWS, RowEditor
from tests.editing_tiny import make_editor, make_requests


def test_the_naive_loop_makes_the_same_edits():
    editor = make_editor("blip2")
    like = RowEditor(editor.model, editor.collator.processor, editor.config).prepare(ROWS[3], editor)
    before = {k: v.clone() for k, v in editor.model.state_dict().items()}
    made = {name: way(like, make_requests("blip2", 3)) for name, way in speed.WAYS.items()}
    assert speed.differences(made) == []
    assert all(len(entries) == 3 and entries[0].steps for entries in made.values())
    assert all(torch.equal(v, before[k]) for k, v in editor.model.state_dict().items())
    name = "Editor, batches of 128"
    made[name] = [replace(e, loss=(e.loss or 0.0) + 1) for e in made[name]]
    (told,) = speed.differences(made)
    assert f"{speed.NAIVE} and {name} do not make the same edits" in told and "differ by 1.0000 on average" in told


def test_the_goal_of_speed_is_printed():
    row = {"edits_per_second": 1, "edits_per_cpu_second": 1, "times_naive": 9.9, "times_naive_cpu": 9.9}
    rows = {name: row | {"mean_steps": 3, "reached": "4 of 4"} for name in speed.WAYS}
    result = {"seed": 0, "edits": 4, "rounds": 1, "threads": 1, "rows": rows}
    assert "**MISSED**: 10 times the naive loop, in wall and in CPU time (9.9, " in speed.table(result)
    rows["Editor, batches of 32"] = rows["Editor, batches of 32"] | {"times_naive": 12.0}
    assert "**MISSED**" in speed.table(result)  # a busy machine, perhaps
    on_gpu = speed.table(result | {"device": "NVIDIA H200"})  # whose work is in no CPU time
    assert "median of 1 rounds, NVIDIA H200\n" in on_gpu and "in wall time (" in on_gpu
    rows["Editor, batches of 32"] = rows["Editor, batches of 32"] | {"times_naive_cpu": 10.0}
    goal = "10 times the naive loop, in wall and in CPU time (10.0, Editor, batches of 32)"
    assert f"- met: {goal}" in speed.table(result)
    shown = speed.table(result | {"differ": ["a and b do not make the same edits"]})  # then no speed counts
    assert f"- **MISSED**: {goal}\n- **a and b do not make the same edits**" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_the_command_refuses_a_device_that_is_not_there():
    result = CliRunner().invoke(run.app, ["--speed", "--device", "cuda"])
    assert result.exit_code == 2 and "there is no CUDA device" in " ".join(result.output.split())


def test_the_command_refuses_what_it_does_not_know():
    for arguments, told in ((["--table", "5"], "--table must be some of 1, 2, 3, 4"), (["--figure", "6"], "--figure")):
        result = CliRunner().invoke(run.app, arguments)
        assert result.exit_code == 2 and told in " ".join(result.output.split())


def test_some_rows_of_a_table_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(cells, "fill", lambda wanted, store, scale, environment: asked.append((wanted, scale)) or [])
    monkeypatch.setattr(run, "redraw", lambda folder: None)
    monkeypatch.setattr(run, "write_report", lambda folder: folder)
    chosen = ["--table", "2", "--methods", "UniKE; MEND"]
    assert CliRunner().invoke(run.app, chosen).exit_code == 0
    ((wanted, scale),) = asked
    assert {cell.method for cell in wanted} == {"UniKE", "MEND"} and scale.device == "cpu"
    assert {cell.k for cell in wanted if cell.method == "UniKE"} == {10, 20, 100, 1000}
    refused = CliRunner().invoke(run.app, [*chosen, "--methods", "unike"])
    assert refused.exit_code == 2 and "UniKE, routed" in " ".join(refused.output.split()) and len(asked) == 1


def test_a_stopped_ablations_rows_serve_the_same_code_until_it_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "code", lambda *folders: "one")
    first = run.kept(0, [])
    monkeypatch.setattr(run, "code", lambda *folders: "another")
    assert run.kept(0, []) != first
    monkeypatch.setattr(run.records, "records", lambda *asked: [])
    monkeypatch.setattr(run.tables, "report", lambda result: "")
    monkeypatch.setattr(run, "save", lambda name, result: name)
    monkeypatch.setattr(run, "write_report", lambda: "")
    monkeypatch.setattr(run.ablation, "run", lambda *rest, keep, **options: keep.write_text("{}") and {})
    assert CliRunner().invoke(run.app, ["--rows", "ablation", "--seeds", "0"]).exit_code == 0
    assert not list(tmp_path.iterdir())


def test_a_bench_is_made_on_the_device_that_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(
        world, "prepared", lambda base, config, **how: made.append(how) or SimpleNamespace(collator=None)
    )
    monkeypatch.setattr(cells, "Examiner", lambda collator, batch_size: None)
    cells.Bench(0, replace(cells.QUICK, device="meta"))
    assert made == [{"quick": True, "device": "meta"}]
