"""The search for launch choices, with a timer that decides who wins."""

import json

import pytest
import torch

from tests.kernel_tools import DEVICE, on_cuda
from unike_kernels.triton_kernels import launching, tune, tuning

TINY = {"tiny": tune.Model(d=64, width=64, heads=2, gated=True, act="silu", n=40, items=50, k=8)}


def test_neighbours_differ_in_one_entry():
    choice = {"BN": 16, "programs": 64, "num_warps": 4, "num_stages": 3}
    found = list(tune.neighbours(choice))
    assert {"BN": 32, "programs": 64, "num_warps": 4, "num_stages": 3} in found
    assert all(sum(choice.get(name) != value for name, value in other.items()) == 1 for other in found)
    assert all(other["BN"] >= 16 for other in found)
    assert len(found) == 1 + 2 + 1 + 2  # 32; 32 and 128; 8; 2 and 4
    in_cuda = list(tune.neighbours({"SPLIT": 1, "ROWS": 4}))
    assert {"SPLIT": 8, "ROWS": 4} in in_cuda and {"SPLIT": 1, "ROWS": 2} in in_cuda and len(in_cuda) == 5
    assert list(tune.neighbours({"launches": 1})) == [{"launches": 2}]


def test_same_allows_another_order_of_summation_only():
    a = torch.tensor([1.0, -2.0])
    assert tune.same([a], [a + 1e-5])
    assert not tune.same([a], [a + 1e-2])
    assert not tune.same([a * float("nan")], [a])
    assert tune.same([torch.arange(200)], [torch.arange(200)])
    assert not tune.same([torch.arange(200)], [torch.arange(200).flip(0)])
    assert not tune.same([a], [a, a])


@pytest.fixture(scope="module")
def ready():
    """Every operator, forward and backward, small; the CUDA C++ kernels in the emulator where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            on_cuda(patch)
        yield tune.cases(DEVICE, TINY, tokens=(1, 17, 65), dtypes=(torch.float32,))


def test_cases_use_every_kernel_that_has_rows(ready):
    tuner = tune.Tuner(ready, lambda run: 1.0)
    assert {row.kernel for row in tuner.rows} == {row.kernel for row in tuning.ROWS}
    assert len({tune.key(row) for row in tuner.rows}) == len(tuner.rows)
    for name, expected in tuner._expected.items():
        assert all(bool(torch.isfinite(t).all()) for t in expected if t.is_floating_point()), name


def test_cases_are_named_by_their_words(ready):
    one = tune.named(ready, ["cosine_topk tiny float32 T=1"])
    assert one and all({"cosine_topk", "T=1"} <= {*name.split()} for name in one)  # not T=17
    assert tune.named(ready, []) == ready
    both = tune.named(ready, ["T=1 cosine_topk", "augmented_ffn"])
    assert {name.split()[0] for name in both} == {"cosine_topk", "augmented_ffn"} and len(both) > len(one)
    with pytest.raises(ValueError, match="no case has all words of 'T=2'; one is named "):
        tune.named(ready, ["T=2"])


def seen(run, kernel):
    """The constants with which `run` starts a kernel."""
    found = []
    launch = launching.launch

    def spy(what, grid, *args, **constants):
        if what.__name__ == kernel:
            found.append(constants)
        launch(what, grid, *args, **constants)

    launching.launch = spy
    try:
        run()
    finally:
        launching.launch = launch
    return found[0]


def test_the_quickest_choice_wins_and_its_file_is_taken(ready, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 1)  # the interpreter takes seconds for some choices
    name = "knowledge_shift given tiny float32 T=1"
    fake = lambda run: 1.0 * seen(run, "knowledge_shift_attend")["BLOCK_D"]  # noqa: E731
    tuner = tune.Tuner({name: ready[name]}, fake)
    row = next(row for row in tuner.rows if row.kernel == "knowledge_shift_attend")
    start = row.choice["BLOCK_D"]
    best = tuner.improve(row)
    assert best["BLOCK_D"] == start // 2
    assert {k: v for k, v in best.items() if k != "BLOCK_D"} == {k: v for k, v in row.choice.items() if k != "BLOCK_D"}

    path = tmp_path / "rows.json"
    path.write_text(json.dumps([r._asdict() for r in tuner.table(tuning.architecture(DEVICE))]))
    monkeypatch.setenv("UNIKE_TUNING", str(path))
    assert seen(ready[name], "knowledge_shift_attend")["BLOCK_D"] == best["BLOCK_D"]


def test_a_wrong_result_or_a_failure_never_wins():
    """A kernel that is quicker the larger its block, wrong from 64 on, and fails with 8 warps."""
    row = tuning.Row("made_up", 0, {}, {"BN": 16, "num_warps": 4})

    def run():
        choice = tuning.choose("made_up", torch.device("cpu"))
        if choice["num_warps"] == 8:
            raise RuntimeError("out of resources")
        return [torch.full((4,), 2.0 if choice["BN"] >= 64 else 1.0)]

    tuning.ROWS.append(row)
    try:
        tuner = tune.Tuner({"case": run}, lambda run: 1.0 / tuning.choose("made_up", torch.device("cpu"))["BN"])
        assert tuner.improve(row) == {"BN": 32, "num_warps": 4}
        assert any("out of resources" in why for why in tuner.refused)
        assert any("other results" in why for why in tuner.refused)
        assert tuner.table(90) == [tuning.Row("made_up", 90, {}, {"BN": 32, "num_warps": 4})]
    finally:
        tuning.ROWS.remove(row)


def test_a_gain_within_the_noise_changes_nothing():
    row = tuning.Row("made_up", 0, {}, {"BN": 16, "num_warps": 4})

    def run():
        tuning.choose("made_up", torch.device("cpu"))
        return [torch.ones(4)]

    tuning.ROWS.append(row)
    try:
        times = iter([100.0] + [98.0] * 20)
        assert tune.Tuner({"case": run}, lambda run: next(times)).improve(row) == dict(row.choice)
    finally:
        tuning.ROWS.remove(row)
