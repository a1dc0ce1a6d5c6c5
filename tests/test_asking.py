"""What a case asks: against discriminants written out, and what it keeps from a router's edits."""

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import QUESTIONS, ask, make_editor, make_requests
from unike_kernels.config import RoutingConfig
from unike_kernels.editing.asking import LEAST, SHARE, asking, discriminants
from unike_kernels.edits import Calibration, Edits
from unike_kernels.routing import Router


def made(prompts, per_prompt=300, d=24, spread=8.0):
    """Cases whose first two coordinates say what is asked, all others what it is about."""
    generator = torch.Generator().manual_seed(0)
    corners = spread * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[: len(prompts)]
    states = torch.randn(len(prompts) * per_prompt, d, generator=generator)
    states[:, 2:] *= 2
    states[:, :2] += corners.repeat_interleave(per_prompt, dim=0)
    return states, [p for p in prompts for _ in range(per_prompt)]


def test_discriminants_are_those_of_the_textbook():
    """scikit-learn's, where every prompt has as many cases: they span the same space, with the same ratios."""
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")
    states, prompts = made("abcd", 40)
    groups = states.double().split(40)
    ours = discriminants(groups)
    assert ours.shape == (24, 2)
    fitted = discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen").fit(states.double().numpy(), prompts)
    theirs = torch.from_numpy(fitted.scalings_[:, :2])
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(ours, theirs, dim=0).abs(), torch.ones(2).double())
    around = torch.cat([g - g.mean(dim=0) for g in groups]) @ ours
    torch.testing.assert_close(around.T @ around / (160 - 4), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_it_tells_what_is_asked_and_not_what_it_is_about():
    states, prompts = made("abc")
    found = asking(states, prompts)
    assert found.shape == (2, 24) and found.dtype == torch.float32
    assert torch.equal(found, asking(states, prompts))
    apart = torch.cdist(states @ found.T, states @ found.T)
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    within = same & ~torch.eye(len(states), dtype=torch.bool)
    assert float((apart[within] <= 1).float().mean()) == pytest.approx(SHARE, abs=2e-3)
    assert float((apart[~same] <= 1).float().mean()) < 0.05  # eight deviations apart, and five are let pass
    torch.testing.assert_close(found[:, :2].norm(), found.norm(), rtol=0.05, atol=0)


def test_a_prompt_that_changes_little_is_none_of_them():
    states, prompts = made("ab", spread=0.5)
    assert asking(states, prompts) is None
    states, prompts = made("abcd")
    states[900:, :2] -= 8.0  # d asks what a asks, in other words
    assert asking(states, prompts).shape == (2, 24)
    a, d = (states[i : i + 300].mean(dim=0) for i in (0, 900))
    assert (asking(states, prompts) @ (a - d)).norm() < 0.1


def test_prompts_that_are_asked_once_tell_nothing():
    states, prompts = made("ab", 40)
    assert asking(states, [str(i) for i in range(80)]) is None and asking(states, ["a"] * 80) is None
    assert asking(states[: LEAST - 1].repeat(2, 1), ["a"] * (LEAST - 1) + ["b"] * (LEAST - 1)) is None
    assert asking(states[:1].expand(80, -1), prompts) is None  # all in the same place
    with pytest.raises(ValueError, match="80 states, but 3 prompts and 0 questions"):
        asking(states, list("abc"))
    with pytest.raises(ValueError, match="80 states, but 80 prompts and 2 questions"):
        asking(states, prompts, ["x", "y"])


def test_what_is_said_to_ask_the_same_is_let_pass():
    states, prompts = made("ab")
    a, b = states[:300].mean(dim=0), states[300:].mean(dim=0)
    found = asking(states, prompts)
    assert (found @ (a - b)).norm() > 1.5
    assert torch.equal(asking(states, prompts, [None] * 600), found)
    questions = [f"picture {i % 300}" if i % 300 < 100 else None for i in range(600)]  # b is a, in other words
    told = asking(states, prompts, questions)
    assert float((told @ (states[:100] - states[300:400]).T).norm(dim=0).max()) <= 1.001
    torch.testing.assert_close(told / told.norm(), found / found.norm())


def test_more_features_than_cases_make_up_no_difference():
    """24 cases with 4,000 features can be told apart by any label; what is found would hold for no other case."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(240, 4000, generator=generator)
    assert asking(states, [str(i % 3) for i in range(240)]) is None


def make_router(config, asks):
    calibration = Calibration(2, torch.zeros(4), torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    calibration.asking = asks
    router = Router.fitting(calibration, config, 2, torch.zeros(4))
    return router, calibration


def test_an_edit_acts_only_where_its_question_is_asked():
    asks = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # the first coordinate says what is asked
    edit = torch.tensor([[0.0, 8.0, 0.0, 0.0]])
    near = torch.tensor([[0.5, 8.0, 0.3, 0.0], [1.5, 8.0, 0.0, 0.0]])
    config = RoutingConfig(mode="routed", cohort=1, margin=-2.0, false_accept_rate=0.5)
    router, calibration = make_router(config, asks)
    router.load(edit, calibration)
    assert router(near)[1].flatten().tolist() == [0, -1]
    assert router(torch.cat([edit, near]))[0][2].item() == -torch.inf
    two = torch.tensor([[0.0, 8.0, 2.0, 0.0], [1.2, 8.0, 0.0, 0.0]])
    router.load(two, calibration)  # a case near the second asks what the first asks
    assert router(torch.tensor([[0.1, 8.0, 0.0, 0.0], [1.1, 8.0, 2.0, 0.0]]))[1].flatten().tolist() == [0, 1]
    without, _ = make_router(RoutingConfig(**{**vars(config), "asking": False}), asks)
    without.load(edit, calibration)
    assert without(near)[1].flatten().tolist() == [0, 0] and len(without.asking) == 0
    assert router.half().asking.dtype == router.asks.dtype == torch.float32


def test_cases_that_ask_something_else_do_not_raise_the_threshold():
    config = RoutingConfig(mode="routed", false_accept_rate=0.0)
    asks = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    edit = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    cases = torch.tensor([[2.0, 9.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])  # the first is near, but asks something else
    reached = []
    for of in (None, asks):
        calibration = Calibration(2, torch.zeros(4), cases, None, of)
        router = Router.fitting(calibration, config, 1, edit)
        router.load(edit, calibration)
        reached.append(float(router.threshold))
    assert reached[1] < reached[0]


def test_a_router_has_room_for_as_many_directions_as_it_was_patched_with():
    router, calibration = make_router(RoutingConfig(mode="routed"), torch.randn(1, 4))
    with pytest.raises(ValueError, match="room for 1 directions of asking .* but got 2"):
        router.load(torch.randn(1, 4), Calibration(2, torch.zeros(4), calibration.cases, None, torch.randn(2, 4)))
    assert not router.asking.any() and not router.keys.any()
    router.load(torch.randn(1, 4), Calibration(2, torch.zeros(4), calibration.cases))  # without: all ask the same
    assert not router.asking.any()


def test_prompts_asked_of_several_pictures_are_told_apart(tmp_path):
    editor = make_editor("blip2")
    assert editor.edit(make_requests("blip2", 1), progress=False).calibration.asking is None  # four cases a prompt
    editor.calibrate([ask("blip2", QUESTIONS[i % 2], 20 + i) for i in range(40)], progress=False)
    edits = editor.edit(make_requests("blip2", 1), progress=False)
    found = edits.calibration.asking
    assert found is not None and torch.equal(found, asking(editor.cases, editor.prompts))
    assert len(editor.prompts) == len(editor.cases) == 52
    editor.save(tmp_path / "editor.safetensors")
    again = make_editor("blip2")
    again.load(tmp_path / "editor.safetensors")
    assert torch.equal(again.edit(make_requests("blip2", 1), progress=False).calibration.asking, found)
    edits.save_pretrained(tmp_path / "edits")
    loaded = Edits.from_pretrained(tmp_path / "edits")
    assert torch.equal(loaded.calibration.asking, found)
    handle = uk.patch(editor.model, loaded, routing="routed")
    assert torch.equal(handle.record.layers[0].router.asking, found)
