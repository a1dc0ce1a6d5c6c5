"""The GPU check, as far as it can be had without a GPU: its steps, their limits, and the parts that compute."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, on_cuda

from bench.gpu_check import small, steps, twins
from bench.latency.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = ["bash", "bench/gpu_check.sh", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())


def fake(name, code, seconds=20.0, **more):
    return steps.Step(name, (sys.executable, "-c", code), seconds, **more)


def test_a_failed_step_stops_nobody_and_everything_is_kept(tmp_path):
    report = tmp_path / "report.json"
    wanted = [
        fake("good", f"open({str(report)!r}, 'w').write('[1, 2]'); print('fine')", report=report),
        fake("bad", "print('words'); raise SystemExit(3)"),
        fake("slow", "import time; print('here', flush=True); time.sleep(60)", seconds=2.0),
        fake("absent", "", missing="no such tool"),
        fake("last", "print('still runs')"),
    ]
    file = tmp_path / "out.json"
    results = steps.run_all(wanted, {"device": "none"}, file, 60.0)
    assert json.loads(file.read_text()) == results
    by_name = {step["name"]: step for step in results["steps"]}
    assert [step["passed"] for step in results["steps"]] == [True, False, False, False, True]
    assert by_name["good"]["report"] == [1, 2] and "words" in by_name["bad"]["said"]
    assert "here" in by_name["slow"]["said"] and "stopped after 2 s" in by_name["slow"]["said"]
    assert by_name["slow"]["seconds"] < 20 and by_name["absent"]["said"] == "no such tool"
    shown = steps.table(results)
    assert shown.count("FAILED") == 3 and "words" in shown and "fine" not in shown
    late = steps.run_all([fake("never", "print(1)")], {}, file, 0.0)
    assert late["steps"][0]["said"] == "no time was left for it"


def test_steps_side_by_side_and_alone(tmp_path):
    """Two that each wait for the other's file pass only together; what is alone starts when they are done."""
    wait = "import time, pathlib; pathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
    a, b = (str(tmp_path / name) for name in "ab")
    alone = f"import os; assert os.path.exists({a!r}) and os.path.exists({b!r})"
    wanted = [fake("first", wait.format(a, b), beside=True), fake("second", wait.format(b, a), beside=True)]
    wanted.append(fake("alone", alone))
    results = steps.run_all(wanted, {}, tmp_path / "out.json", 60.0, tmp_path / "logs")
    assert [(step["name"], step["passed"]) for step in results["steps"]] == [
        ("first", True), ("second", True), ("alone", True)
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["alone.log", "first.log", "second.log"]


def test_every_command_names_something_that_is_there():
    found = steps.steps()
    assert len({step.name for step in found}) == len(found) >= 8
    for step in found:
        for word in step.command:
            if word.startswith("bench."):
                assert (ROOT / (word.replace(".", "/") + ".py")).exists(), word
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word
    assert all(step.seconds <= 260 for step in found)
    others = next(step for step in found if step.name == "all other tests")
    assert dict(others.environment) == {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    kernels = next(step.command for step in found if step.name == "kernel tests")
    assert sum(word.startswith("tests/test_triton_") for word in kernels) >= 6
    assert "tests/test_cuda_knowledge_shift.py" in kernels


def test_small_cases_are_right_and_can_fail(monkeypatch):
    small.check(DEVICE, torch.float32, 3)
    monkeypatch.setattr(small.reference, "extra_neurons", lambda x, *_, **options: 1.01 * torch.zeros_like(x) + x)
    with pytest.raises((AssertionError, RuntimeError)):
        small.check(DEVICE, torch.float32, 3)


def test_small_cases_of_the_cuda_kernel_are_right_and_can_fail(monkeypatch):
    on_cuda(monkeypatch)
    small.check_cuda(DEVICE, torch.bfloat16, 3)
    monkeypatch.setattr(small.ops, "knowledge_shift", lambda h_input, **options: (1.1 * h_input, torch.ones(3)))
    with pytest.raises((AssertionError, RuntimeError)):
        small.check_cuda(DEVICE, torch.bfloat16, 3)


DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


def toy(name):
    return dataclasses.replace(SHAPES[name], d=32, ffn=48, layers=4, heads=2, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", ["tiny-blip2", "llama-100m"])
def test_twins_agree(name, routed):
    found = twins.compare(twins.wide(toy(name), routed, DEVICE, DTYPE, items=12), new=2)
    assert found["same tokens generated"] or not INTERPRETED
    assert found["error, kernels"] <= 1e-2 * found["largest logit"]


def test_a_blip2_and_its_twin_agree():
    found = twins.compare(twins.tiny_blip2(True, DEVICE, DTYPE), new=1, backend="auto")
    assert found["edits move the logits by"] > 10 * found["error, kernels"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: 1.02 * logits, "times that of plain torch"),
        (lambda logits: logits.roll(1, -1), "times that of plain torch"),
    ],
)
def test_twins_notice_a_wrong_kernel(change, message, monkeypatch):
    answer = twins.answer

    def wrong(twin, backend, new):
        logits, tokens = answer(twin, "reference", new)
        return (change(logits) if backend == "triton" else logits), tokens

    monkeypatch.setattr(twins, "answer", wrong)
    with pytest.raises(AssertionError, match=message):
        twins.compare(twins.wide(toy("tiny-blip2"), False, DEVICE, torch.float32, items=12), new=1)


def test_twins_notice_edits_that_do_nothing():
    twin = twins.wide(toy("tiny-blip2"), False, DEVICE, torch.float32, items=12)
    for layer in twin.edits.layers.values():
        layer.values.zero_(), layer.zeta.zero_()
    shift = dataclasses.replace(twin.edits.config.shift, enabled=False)
    twin.edits.config = dataclasses.replace(twin.edits.config, shift=shift)
    with pytest.raises(AssertionError, match="the edits move the logits by less than"):
        twins.compare(twin, new=1)
