"""What wording changes in a state: against whitening written out, and what it takes from a router's sight."""

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import QUESTIONS, ask, make_editor, make_requests
from unike_kernels.config import RoutingConfig
from unike_kernels.editing import wording as module
from unike_kernels.editing.wording import MOST, RIDGE, wording
from unike_kernels.edits import Calibration, Edits
from unike_kernels.routing import Router


def taken_out(x, w):
    return x - (x @ w.T) @ w


@pytest.mark.parametrize(("groups", "d"), [(13, 12), (4, 40)])
def test_it_is_whitening_with_the_covariance_around_each_question(groups, d):
    torch.manual_seed(0)
    states = torch.randn(3 * groups + 2, d) * torch.linspace(0.2, 3, d)
    questions = [str(i // 3) for i in range(3 * groups)] + [None, "asked once"]
    w = wording(states, questions).double()
    asked = states[: 3 * groups].double().view(groups, 3, d)
    around = (asked - asked.mean(dim=1, keepdim=True)).flatten(0, 1)
    scatter = around.T @ around / len(around)
    ridge = RIDGE * scatter.trace() / d
    values, vectors = torch.linalg.eigh(scatter + ridge * torch.eye(d))
    whitened = (vectors * (ridge / values).sqrt()) @ vectors.T
    torch.testing.assert_close(torch.eye(d, dtype=torch.float64) - w.T @ w, whitened, rtol=0, atol=1e-6)


def test_the_directions_that_change_most_are_kept(monkeypatch):
    torch.manual_seed(0)
    states = torch.randn(600, 200)
    questions = [str(i // 2) for i in range(600)]
    assert wording(states, questions).shape == (MOST, 200)
    assert torch.equal(wording(states, questions), wording(states, questions))
    monkeypatch.setattr(module, "MOST", 1)
    states[::2, 7] += 20  # the first wording of every question
    assert wording(states, questions)[0].abs().argmax() == 7


def test_where_nothing_is_asked_twice_there_is_none():
    states = torch.randn(4, 3)
    assert wording(states, [None] * 4) is None and wording(states, list("abcd")) is None
    assert wording(states[:1].expand(4, -1), list("aabb")) is None  # in the same words
    with pytest.raises(ValueError, match="4 states, but 3 questions"):
        wording(states, list("abc"))


def test_a_router_looks_past_it():
    """Questions differ in one direction, their two wordings in another, by more."""
    about, way = torch.eye(16)[1:13], 3 * torch.eye(16)[0]
    cases = torch.cat([about[2:] + way, about[2:] - way])
    w = wording(cases, [str(i % 10) for i in range(20)])
    edits, asked = about[:2] + way, torch.cat([about[:2] - way, about[:2] + way])
    config = RoutingConfig(mode="routed", cohort=10)

    def chosen(of):
        router = Router(config, 2, torch.zeros(16), max_cases=20, max_wording=MOST)
        router.load(edits, Calibration(2, torch.zeros(16), cases, of))
        return router(asked)[1].flatten().tolist()

    assert chosen(None) == [-1, -1, 0, 1] and chosen(w) == [0, 1, 0, 1]
    router = Router(config, 2, torch.zeros(16), max_cases=20, max_wording=MOST)
    router.load(edits, Calibration(2, torch.zeros(16), cases, w))
    router.load(edits, Calibration(2, torch.zeros(16), cases))  # and forgets it with the next edits
    assert router(asked)[1].flatten().tolist() == [-1, -1, 0, 1]
    assert router.half().wording.dtype == torch.float32


def test_a_router_has_room_for_as_many_directions_as_it_was_patched_with():
    router = Router(RoutingConfig(mode="routed"), 1, torch.zeros(3), max_cases=2, max_wording=1)
    with pytest.raises(ValueError, match="room for 1 directions of wording .* but got 2"):
        router.load(torch.randn(1, 3), Calibration(2, torch.zeros(3), torch.randn(2, 3), torch.randn(2, 3)))
    assert not router.wording.any() and not router.keys.any()


def test_questions_in_several_wordings_make_routing_look_past_the_wording(tmp_path):
    editor = make_editor("blip2")
    triplets = [t | {"question": f"picture {i // 2}"} for i, t in enumerate(editor.triplets)]
    assert editor.edit(make_requests("blip2", 1), progress=False).calibration.wording is None
    editor.build_memory(triplets, progress=False)
    editor.fit(progress=False)
    first = editor.edit(make_requests("blip2", 1), progress=False).calibration.wording
    assert first is not None and torch.equal(first, wording(editor.cases, [f"picture {i // 2}" for i in range(12)]))
    editor.calibrate([ask("blip2", QUESTIONS[0], 50) | {"question": "picture 0"}], progress=False)
    edits = editor.edit(make_requests("blip2", 1), progress=False)
    assert edits.calibration.wording.shape != first.shape or not torch.equal(edits.calibration.wording, first)
    editor.save(tmp_path / "editor.safetensors")
    again = make_editor("blip2")
    again.load(tmp_path / "editor.safetensors")
    assert torch.equal(
        again.edit(make_requests("blip2", 1), progress=False).calibration.wording, edits.calibration.wording
    )
    edits.save_pretrained(tmp_path / "edits")
    loaded = Edits.from_pretrained(tmp_path / "edits")
    assert torch.equal(loaded.calibration.wording, edits.calibration.wording)
    assert len(uk.patch(editor.model, loaded, routing="routed").record.layers[0].router.wording) == len(
        edits.calibration.wording
    )
    with pytest.raises(ValueError, match="triplet 1: question must be a non-empty string or left out, but is 3"):
        editor.build_memory([triplets[0], triplets[1] | {"question": 3}])
    with pytest.raises(ValueError, match="calibration case 0: question must be .* but is ' '"):
        editor.calibrate([ask("blip2", QUESTIONS[0], 50) | {"question": " "}])
