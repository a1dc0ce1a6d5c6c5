"""The microbenchmarks: nothing wrong is timed, rivals get the same inputs, a stopped run goes on, goals are honest."""

import dataclasses
import json

import pytest
import torch

from bench.latency import goals, run, stack
from bench.latency.cases import OURS, cases, raw_shift, routed_neurons, search, shift
from bench.latency.gate import verdict
from bench.latency.shapes import SHAPES, hidden
from bench.latency.timing import compare

CPU = torch.device("cpu")
QUICK = {case.operator: case for case in cases(CPU, quick=True)}


def inputs_of(case, seed=0, dtype=torch.float32):
    return case.make(torch.Generator().manual_seed(seed), dtype, CPU)


@pytest.mark.parametrize("operator", QUICK)
def test_every_provider_computes_the_same(operator):
    case = QUICK[operator]
    inputs = inputs_of(case)
    eager = [name for name in case.providers if "compiled" not in name]
    assert OURS in eager and len(eager) >= 3
    words = {name: verdict(case, name, inputs) for name in eager}
    assert words.pop(OURS) == "exact"
    assert set(words.values()) <= {"exact", "rounds more", "floor"}


@pytest.mark.parametrize("operator", QUICK)
def test_what_is_wrong_is_not_timed(operator):
    case = QUICK[operator]

    def wrong(**inputs):
        result = case.providers[OURS](**inputs)
        if operator == "cosine_topk":
            return result[0], (result[1] + 1) % inputs["keys"].shape[0]
        first = result if isinstance(result, torch.Tensor) else result[0]
        return first + 0.1 * first.abs().max()

    rival = dataclasses.replace(case, providers={OURS: case.providers[OURS], "wrong": wrong})
    result = run.time_case(rival, CPU, torch.float32, 0.01)
    assert "wrong" in result["verdicts"] and set(result["timings"]) == {OURS}
    with pytest.raises(AssertionError, match="unike is not timed, it is wrong"):
        run.time_case(dataclasses.replace(case, providers={OURS: wrong}), CPU, torch.float32, 0.01)


def test_inputs_are_never_zero_and_have_outlier_channels():
    x = hidden(torch.Generator().manual_seed(0), 64, 768, dtype=torch.float32, device=CPU)
    size = x.abs().mean(0)
    assert (x != 0).all()
    assert 5 <= (size > 10 * size.median()).sum() <= 12


def test_moved_and_flops_by_hand():
    shape = SHAPES["vicuna-7b"]
    assert search(shape, 1, 10_000).moved == 10_000 * 4096 + 4096
    assert search(shape, 2, 10_000).flops == 2 * 2 * 10_000 * 4096
    assert routed_neurons(shape, 1, 100).moved == 30 * 4096 + 2 * 4096  # ten neurons of three rows, one in, one out
    items = 2 * 16 * 40 * 4096  # keys and values; with several key heads as many elements, with four of 28 a seventh
    assert raw_shift(shape, 16, CPU).moved == shift(shape, 16, CPU).moved == items + 3 * 16 * 4096
    assert shift(SHAPES["qwen2.5-vl-7b"], 1, CPU).moved == 2 * 40 * 512 + 3 * 3584


def test_rivals_take_turns():
    seen = []
    rivals = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(2)] for name in "ab"}
    timings = compare(rivals, CPU, seconds=0.0, capturable=set())
    turns = seen[4:]  # after each has run each set once
    assert [name for name, _ in turns] == ["a", "b"] * (len(turns) // 2)
    assert [i for name, i in turns if name == "a"][:4] == [0, 1, 0, 1]
    assert timings["a"].fastest <= timings["a"].median and timings["a"].runs >= 5


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "cpu.json"
    timed = []
    monkeypatch.setattr(run, "cases", lambda device, quick: list(QUICK.values())[:2])
    monkeypatch.setattr(run.stacks, "stacks", lambda device, quick: [])
    monkeypatch.setattr(
        run, "time_case", lambda case, *rest: timed.append(case.operator) or {"operator": case.operator}
    )
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1.0)
    run.run(CPU, file, quick=True, only="extra_neurons", seconds=0.0)
    run.run(CPU, file, quick=True, only=None, seconds=0.0)
    assert timed == ["extra_neurons", "augmented_ffn"]
    monkeypatch.setattr(run, "commit", lambda: "another")  # figures of another commit do not mix with new ones
    run.run(CPU, file, quick=True, only="augmented_ffn", seconds=0.0)
    assert len(json.loads(file.read_text())["cases"]) == 1


def test_a_patched_decoder_is_timed_and_a_patch_that_does_nothing_is_refused(monkeypatch):
    small = dataclasses.replace(next(stack.stacks(CPU, quick=True)), items=50, edits=3)
    timings = stack.time_stack(small, CPU, torch.float32, 0.01)
    assert set(timings) == {"unpatched", "patched"} and timings["patched"].median > 0
    make = stack.make_edits

    def idle(model, what, generator):
        edits = make(model, what, generator)
        for layer in edits.layers.values():
            layer.values.zero_(), layer.zeta.zero_()
        config = dataclasses.replace(edits.config, shift=dataclasses.replace(edits.config.shift, alpha=0.0))
        return dataclasses.replace(edits, config=config)

    monkeypatch.setattr(stack, "make_edits", idle)
    with pytest.raises(AssertionError, match="the patch changed nothing"):
        stack.time_stack(small, CPU, torch.float32, 0.01)


def test_goals_name_the_worst_figure_and_what_was_not_measured():
    step = {"unpatched": {"median": 100.0}, "patched": {"median": 108.0}}
    worse = {"unpatched": {"median": 100.0}, "patched": {"median": 112.0}}
    results = {"environment": {}, "cases": {}, "stacks": {"tiny-blip2 bs=1 N=10000 edits=1 routed": step}}
    lines = list(goals.goals(results))
    assert len(lines) == len(goals.GOALS)
    assert sum(line.startswith("not measured here") for line in lines) == len(lines) - 1
    (line,) = [line for line in lines if line.startswith("met")]
    assert "1.080 (tiny-blip2 bs=1 N=10000 edits=1 routed)" in line
    results["stacks"]["tiny-blip2 bs=1 N=10000 edits=9 routed"] = worse
    (line,) = [line for line in goals.goals(results) if line.startswith("MISSED")]
    assert "1.120" in line
