"""The microbenchmarks: nothing wrong is timed, rivals get the same inputs, a stopped run goes on, goals are honest."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from bench.latency import gate, goals, kernels, neurons, plots, run, searches, stack, swap
from bench.latency.case import CUDA, INDEXED, OURS
from bench.latency.cases import cases
from bench.latency.gate import verdicts
from bench.latency.neurons import routed_neurons, tenants
from bench.latency.searches import ragged, search
from bench.latency.shapes import SHAPES, hidden
from bench.latency.shifts import raw_shift, shift
from bench.latency.timing import _reset, compare
from unike_kernels.triton_kernels import tuning

CPU = torch.device("cpu")
QUICK = {case.name: case for case in cases(CPU, quick=True)}


def inputs_of(case, seed=0, dtype=torch.float32):
    return case.make(torch.Generator().manual_seed(seed), dtype, CPU)


def eager(case):
    """The case without what takes a compiler."""
    kept = {name: run for name, run in case.providers.items() if "compiled" not in name}
    return dataclasses.replace(case, providers=kept)


@pytest.mark.parametrize("name", QUICK)
def test_every_provider_computes_the_same(name):
    case = eager(QUICK[name])
    assert OURS in case.providers and len(case.providers) >= 2 + (case.operator != "external path")
    words = verdicts(case, [inputs_of(case)])
    assert words.pop(OURS) == "exact"
    assert set(words.values()) <= {"exact", "rounds more", "floor"}


@pytest.mark.parametrize("name", QUICK)
def test_what_is_wrong_is_not_timed(name):
    case = QUICK[name]

    def wrong(**inputs):
        result = case.providers[OURS](**inputs)
        if case.operator == "cosine_topk":
            return result[0], (result[1] + 1) % inputs["keys"].shape[0]
        first = result if isinstance(result, torch.Tensor) else result[0]
        return first + 0.1 * first.abs().max()

    def broken(**inputs):
        raise OSError("no such library")

    rival = dataclasses.replace(case, providers={OURS: case.providers[OURS], "wrong": wrong, "broken": broken})
    result = run.time_case(rival, CPU, torch.float32, 0.01)
    assert set(result["timings"]) == {OURS} and not result["verdicts"]["wrong"].startswith("does not run")
    assert result["verdicts"]["broken"] == "does not run: OSError: no such library"
    with pytest.raises(AssertionError, match="unike is not timed, it is wrong"):
        run.time_case(dataclasses.replace(case, providers={OURS: wrong}), CPU, torch.float32, 0.01)
    with pytest.raises(OSError, match="no such library"):
        verdicts(dataclasses.replace(case, providers={OURS: broken}), [inputs_of(case)])


def test_the_gate_of_a_search_sees_every_way_to_be_wrong(monkeypatch):
    monkeypatch.setattr(gate, "TILE", 300)  # the truth is put together from tiles
    case = ragged(SHAPES["tiny-blip2"], 3, 400)
    inputs = inputs_of(case)

    def with_indices(change):
        def provider(**given):
            scores, indices = case.providers[OURS](**given)
            indices = indices.clone()
            change(indices)
            return scores, indices

        return dataclasses.replace(case, providers={OURS: case.providers[OURS], "rival": provider})

    def word(change):
        return verdicts(with_indices(change), [inputs])["rival"]

    assert word(lambda indices: None) == "exact"
    assert word(lambda indices: indices.copy_(indices.flip(1))) == "exact"  # the order does not matter
    assert "twice" in word(lambda indices: indices[1, 1:2].copy_(indices[1, :1]))
    assert "own range" in word(lambda indices: indices[2].copy_(indices[0]))
    assert "too few" in word(lambda indices: indices[0, :1].fill_(-1))
    assert "less than the best" in word(lambda indices: indices[0].copy_(torch.arange(40)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_list_has_what_the_goals_ask_for(device):
    listed = list(cases(torch.device(device)))
    assert len({case.name for case in listed}) == len(listed)
    sizes = {case.operator: [c for c in listed if c.operator == case.operator] for case in listed}
    assert {"extra_neurons", "augmented_ffn", "cosine_topk", "knowledge_shift", "external path"} <= set(sizes)
    assert any("sets" in case.sizes for case in listed) and any("bank" in case.sizes for case in listed)
    stacks = list(stack.stacks(torch.device(device)))
    assert any(one.per == "token" for one in stacks) and any(one.prefill for one in stacks)
    assert {one.edits for one in stacks} >= {1, 100, 1_000, 10_000}
    if device == "cuda":
        assert {one.rows for one in stacks} >= {1, 16, 64} and {one.items for one in stacks} >= {1_000, 1_000_000}
        assert max(one.bytes(torch.bfloat16) for one in stacks) < 139e9


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
    sizes = neurons.sizes_of_tenants(64)
    assert tenants(shape, 64).moved == 3 * sum(sizes) * 4096 + 128 * 4096 and 1 <= min(sizes) < max(sizes) <= 64
    assert ragged(shape, 64, 1_000).moved == sum(searches.lengths_of_banks(64, 1_000)) * 4096 + 64 * 4096
    items = 16 * 40 * 4096  # with four key heads of 28 a seventh
    assert shift(shape, 16).moved == raw_shift(shape, 16).moved == 2 * items + 3 * 16 * 4096
    assert shift(SHAPES["qwen2.5-vl-7b"], 1).moved == 2 * 40 * 512 + 3 * 3584


def test_rivals_take_turns():
    seen = []
    rivals = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(2)] for name in "abc"}
    timings = compare(rivals, CPU, seconds=0.0, capturable=set())
    turns = seen[6:]  # after each has run each set once
    names = "".join(name for name, _ in turns)
    assert names.startswith("abcbcacababcbca") and len(names) == 15  # nobody always runs behind the same one
    assert [i for name, i in turns if name == "a"][:4] == [0, 1, 0, 1]
    assert [i for name, i in turns if name == "b"][:4] == [1, 0, 1, 0]  # not the set that "a" has just read
    assert timings["a"].fastest <= timings["a"].median and timings["a"].runs >= 5


def test_a_run_is_reset_outside_of_its_time():
    class Run:
        calls = resets = 0

        def __call__(self):
            assert self.calls == self.resets
            self.calls += 1

        def reset(self):
            self.resets += 1

    one = Run()
    compare({"a": [one], "b": [lambda: None]}, CPU, seconds=0.0, capturable=set())
    assert one.calls == one.resets >= 6
    _reset(lambda: None)


FIRST, SECOND = next(iter(QUICK)), next(name for name in QUICK if name.startswith("augmented_ffn"))


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "cpu.json"
    timed = []
    monkeypatch.setattr(run, "cases", lambda device, quick: [QUICK[name] for name in (FIRST, SECOND)])
    monkeypatch.setattr(run.stacks, "stacks", lambda device, quick: [])
    monkeypatch.setattr(
        run, "time_case", lambda case, *rest: timed.append(case.operator) or {"operator": case.operator}
    )
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1.0)
    run.run(CPU, file, quick=True, only=["extra_neurons"], seconds=0.0)
    run.run(CPU, file, quick=True, only=[], seconds=0.0)
    assert timed == ["extra_neurons", "augmented_ffn"]
    monkeypatch.setattr(run, "commit", lambda folder: "a third")
    done = run.run(CPU, file, quick=True, only=[], seconds=0.0, minutes=0.0)  # no time: all is left, and said to be
    assert done["left"] == 2 and not done["cases"]
    monkeypatch.setattr(run, "commit", lambda folder: "another")  # figures of another commit do not mix with new ones
    run.run(CPU, file, quick=True, only=["augmented_ffn"], seconds=0.0)
    assert len(json.loads(file.read_text())["cases"]) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [(AssertionError("off by one"), "off by one"), (RuntimeError("no room"), "RuntimeError: no room")],
)
def test_a_wrong_result_or_a_failure_is_told_and_stops_nothing_else(error, told, tmp_path, monkeypatch):
    def time_case(case, *rest):
        if case.name == FIRST:
            raise error
        return {"operator": case.operator}

    monkeypatch.setattr(run, "cases", lambda device, quick: [QUICK[name] for name in (FIRST, SECOND)])
    monkeypatch.setattr(run.stacks, "stacks", lambda device, quick: [])
    monkeypatch.setattr(run, "time_case", time_case)
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(run, "matrix_rate", lambda device, dtype: 1.0)
    done = run.run(CPU, tmp_path / "cpu.json", quick=True, only=[], seconds=0.0)
    assert done["wrong"] == {FIRST: told} and list(done["cases"]) == [SECOND]
    monkeypatch.setattr(run, "time_case", lambda case, *rest: {"operator": case.operator})
    done = run.run(CPU, tmp_path / "cpu.json", quick=True, only=[], seconds=0.0)
    assert not done["wrong"] and list(done["cases"]) == [SECOND, FIRST]


SMALL = dataclasses.replace(next(stack.stacks(CPU, quick=True)), items=50, edits=3)


@pytest.mark.parametrize(
    "more", [{}, {"per": "token"}, {"prefill": 9}, {"routed": False}, {"rows": 4, "edits": 2}], ids=str
)
def test_a_patched_decoder_is_timed(more):
    small = dataclasses.replace(SMALL, **more)
    found = stack.time_stack(small, CPU, torch.float32, 0.01)
    assert set(found["timings"]) == {"unpatched", "patched"} and found["timings"]["patched"]["median"] > 0
    assert found["sizes"] == dataclasses.asdict(small)


def test_a_patch_that_does_nothing_is_refused(monkeypatch):
    make = stack.make_edits

    def idle(model, what, generator):
        edits = make(model, what, generator)
        for layer in edits.layers.values():
            layer.values.zero_(), layer.zeta.zero_()
        config = dataclasses.replace(edits.config, shift=dataclasses.replace(edits.config.shift, alpha=0.0))
        return dataclasses.replace(edits, config=config)

    monkeypatch.setattr(stack, "make_edits", idle)
    with pytest.raises(AssertionError, match="the patch changed nothing"):
        stack.time_stack(SMALL, CPU, torch.float32, 0.01)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", ["tiny-blip2", "llama-100m"])
def test_every_run_of_a_step_is_the_same(shape, static):
    model = stack.make_model(dataclasses.replace(SHAPES[shape], layers=2), torch.float32, CPU)
    prompt = torch.randint(4, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    step = stack.Step(model, prompt, static)
    first = step()
    step.reset()
    assert torch.equal(step(), first)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(stack.Prefill(model, prompt)(), stack.Prefill(model, prompt)())


def test_the_unpatched_decoder_shares_the_weights_and_has_no_hooks(monkeypatch):
    seen = {}
    monkeypatch.setattr(stack, "compare", lambda runs, *rest, **more: seen.update(runs) or {})
    stack.time_stack(SMALL, CPU, torch.float32, 0.01)
    base, patched = (seen[name][0].model for name in ("unpatched", "patched"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    pairs = zip(base.parameters(), patched.parameters(), strict=True)
    assert base is not patched and all(a is b for a, b in pairs)


# -------------------------------------------------------------------------------------------------------------- goals


def results_of(device="cpu", **more):
    empty = {"environment": {"cuda": "13.0"} if device == "cuda" else {}, "cases": {}, "stacks": {}}
    return {**empty, "copy_bandwidth": 4e12, **more}


def a_stack(patched, **sizes):
    one = dataclasses.replace(stack.Stack("tiny-blip2", 1, 10_000, 100, True), **sizes)
    timings = {"unpatched": {"median": 100.0, "fastest": 100.0}, "patched": {"median": patched, "fastest": patched}}
    return {one.name: {"sizes": dataclasses.asdict(one), "timings": timings}}


def a_case(operator, shape, sizes, times, moved=0, dtype="bfloat16"):
    timings = {name: {"median": time, "fastest": time} for name, time in times.items()}
    body = {"operator": operator, "shape": shape, "sizes": sizes, "dtype": dtype, "moved_bytes": moved}
    name = f"{operator} {shape} {dtype} {sizes}"
    return {name: {**body, "timings": timings}}


def lines_of(results, start):
    return [line for line in goals.goals(results) if f": {start}" in line]


def test_goals_name_the_worst_figure_and_what_was_not_measured():
    results = results_of(stacks=a_stack(108.0))
    lines = list(goals.goals(results))
    assert len(lines) == len(goals.GOALS) >= 35
    (line,) = lines_of(results, "tiny BLIP-2")
    assert line.startswith("met") and "1.080 (tiny-blip2 bs=1 N=10000 edits=100 routed)" in line
    results["stacks"] |= a_stack(112.0, edits=9) | a_stack(190.0, prefill=64) | a_stack(190.0, per="token")
    (line,) = lines_of(results, "tiny BLIP-2")
    assert line.startswith("MISSED") and "1.120" in line  # other rows, prefills and policies are other goals
    of_gate = [line for line in lines if ": 16: " in line]
    measured = [line for line in lines if not line.startswith("not measured here")]
    assert len(of_gate) == 2 and len(measured) == 3


def test_goals_of_a_gpu_take_medians_of_graphs_alone():
    stacks = a_stack(101.0, shape="vicuna-7b") | a_stack(101.6, shape="vicuna-7b", edits=10_000)
    results = results_of("cuda", stacks=stacks)
    (line,) = lines_of(results, "Vicuna-7B decoding step, retrieval per case")
    assert line.startswith("MISSED") and "1.016" in line
    (line,) = lines_of(results, "vicuna-7b decoding step, 100 to 10,000")
    assert line.startswith("MISSED") and "0.006" in line
    for one in stacks.values():
        one["timings"]["patched"]["why"] = "not captured"
    assert all("not measured" in line for line in goals.goals(results) if "16:" not in line)


def test_arithmetic_of_the_operators_goals():
    cases = a_case("cosine_topk", "vicuna-7b", {"T": 1, "N": 10_000}, {OURS: 30.0, CUDA: 25.0, "mm + topk": 90.0}, 80e6)
    cases |= a_case("cosine_topk", "vicuna-7b", {"T": 16, "N": 10_000}, {OURS: 20.0, "mm + topk": 90.0}, 80e6)
    cases |= a_case("cosine_topk", "vicuna-7b", {"T": 1, "N": 100_000}, {OURS: 190.0, INDEXED: 100.0}, 800e6)
    cases |= a_case(
        "extra_neurons", "vicuna-7b", {"T": 64, "sets": 64}, {OURS: 10.0, "loop over requests": 250.0}, 32e6
    )
    cases |= a_case("extra_neurons", "vicuna-7b", {"T": 64, "edits": 64}, {OURS: 99.0}, 32e6)
    results = results_of("cuda", cases=cases)
    expected = {
        "3: search at 10,000": ("met", 80e6 / 25e-6 / 4e12),  # the quicker of ours, the worst of the sizes
        "4: search, torch.mm + topk over ours at 10,000": ("met", 90 / 25),
        "5: int8": ("met", 1.9),
        "11: 64 edit sets at once, times": ("met", 10e-6 * 4e12 / 32e6),
        "11: 64 edit sets at once, us": ("met", 10.0),
        "11: 64 edit sets at once, a loop": ("met", 25.0),
    }
    for start, (word, value) in expected.items():
        (line,) = lines_of(results, start)
        assert line.startswith(word) and math.isclose(
            float(line.rsplit(" (", 1)[0].rsplit(": ", 1)[1]), value, abs_tol=6e-4
        )
    cases = a_case("cosine_topk", "opt-2.7b", {"T": 8, "N": 10_000}, {OURS: 30.0, "mm + topk": 27.0}, dtype="float32")
    cases |= a_case("cosine_topk", "llama-100m", {"T": 8, "N": 10_000}, {OURS: 1.0, "mm + topk": 25.0})
    results = results_of(cases=cases)
    assert [lines_of(results, f"15: search {of}")[0].split(":")[0] for of in ("on a CPU", "of bf16")] == [
        "MISSED",
        "met",
    ]
    results["environment"]["bf16_units"] = True  # where torch's own product is as fast as any
    without, having = lines_of(results, "15: search of bf16")
    assert without.startswith("not measured here") and having.startswith("met") and "25.000" in having


def test_plots_are_drawn_of_three_points_and_more(tmp_path):
    pytest.importorskip("matplotlib")
    cases = {}
    for items in (1_000, 10_000):
        cases |= a_case("cosine_topk", "opt-2.7b", {"T": 1, "N": items}, {OURS: items / 10, "mm + topk": items / 5})
    results = results_of(cases=cases)
    results["environment"] |= {"device": "a CPU", "torch": "2", "commit": "c"}
    assert list(plots.draw(results, tmp_path / "cpu")) == []
    cases |= a_case("cosine_topk", "opt-2.7b", {"T": 1, "N": 100_000}, {OURS: 9_000.0})
    title, lines = plots.series(results, "cosine_topk", "N")
    assert title == "opt-2.7b bfloat16 T=1" and [size for size, _ in lines[OURS]] == [1_000, 10_000, 100_000]
    (path,) = plots.draw(results, tmp_path / "cpu")
    assert path.name == "cpu-search-items.png" and path.read_bytes().startswith(b"\x89PNG")


def test_kernel_times_are_of_the_choices_that_they_name(monkeypatch):
    toy = dataclasses.replace(SHAPES["vicuna-7b"], d=32, ffn=48, heads=2, kv_heads=2, head_dim=16)
    monkeypatch.setattr(kernels, "SHAPE", toy)
    names = [name for name, _ in kernels.runs(CPU, torch.float32)]
    assert len(set(names)) == len(names) > 20
    pytest.importorskip("unike_kernels.triton_kernels.extra_neurons")  # which brings its rows of the table
    seen = []
    kernels.choosing("selected_rows", {"BK": 512}, lambda: seen.extend(map(chosen_for, ("selected_rows", "hidden"))))()
    assert seen == [{**chosen_for("selected_rows"), "BK": 512}, chosen_for("hidden")]


def chosen_for(kernel):
    return tuning.choose(kernel, CPU, tokens=1, d_out=32, n=10, slow=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_kernel_times_want_a_gpu():
    with pytest.raises(SystemExit, match="there is no CUDA device here"):
        kernels.main()


def test_swaps_are_timed_by_how_much_is_new():
    done = CliRunner().invoke(swap.app, ["--shape", "tiny-blip2", "--edits", "4", "--items", "20"])
    assert done.exit_code == 0, done.output
    times = {
        line.split("│")[1].strip(): int(line.split("│")[2]) for line in done.output.splitlines() if line[:1] == "│"
    }
    assert list(times) == ["nothing", "one edit more", "one edit less, of the middle", "all edits", "a patch anew"]
    assert "tiny-blip2 bs=1 N=20 edits=5 routed" in done.output
    refused = CliRunner().invoke(swap.app, ["--shape", "gpt"])
    assert refused.exit_code == 2 and "gpt" in refused.output
