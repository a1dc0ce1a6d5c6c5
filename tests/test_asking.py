"""What a case asks: against discriminants written out, and what it keeps from a router's edits."""

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import QUESTIONS, TARGETS, ask, make_editor, make_requests
from unike_kernels.config import RoutingConfig
from unike_kernels.editing.asking import LEAST, SHARE, asking, discriminants
from unike_kernels.edits import Calibration, Edits
from unike_kernels.routing import Router


def made(prompts, per_prompt=300, d=24, spread=8.0):
    """Cases whose first two coordinates say what is asked, all others what it is about, and their prompts.

    And their questions: the first prompt's first 20 cases are asked again in other words, near by.
    """
    generator = torch.Generator().manual_seed(0)
    corners = spread * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[: len(prompts)]
    states = torch.randn(len(prompts) * per_prompt, d, generator=generator)
    states[:, 2:] *= 2
    states[:, :2] += corners.repeat_interleave(per_prompt, dim=0)
    prompts, questions = [p for p in prompts for _ in range(per_prompt)], [None] * len(states)
    again = states[:20] + 0.1 * torch.randn(20, d, generator=generator)
    questions[:20] = range(20)
    return torch.cat([states, again]), prompts + ["in other words"] * 20, questions + list(range(20))


def test_discriminants_are_those_of_the_textbook():
    """scikit-learn's, where every prompt has as many cases: they span the same space, with the same ratios."""
    discriminant_analysis = pytest.importorskip("sklearn.discriminant_analysis")
    states, prompts = (part[:160] for part in made("abcd", 40)[:2])
    groups = states.double().split(40)
    ours = discriminants(groups)
    assert ours.shape == (24, 2)
    fitted = discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen").fit(states.double().numpy(), prompts)
    theirs = torch.from_numpy(fitted.scalings_[:, :2])
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(ours, theirs, dim=0).abs(), torch.ones(2).double())
    around = torch.cat([g - g.mean(dim=0) for g in groups]) @ ours
    torch.testing.assert_close(around.T @ around / (160 - 4), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_it_tells_what_is_asked_and_not_what_it_is_about():
    states, prompts, questions = made("abc")
    found = asking(states, prompts, questions)
    assert found.shape == (2, 24) and found.dtype == torch.float32
    assert torch.equal(found, asking(states, prompts, questions))
    apart = torch.cdist(states[:900] @ found.T, states[:900] @ found.T)
    same = torch.tensor([[a == b for b in prompts[:900]] for a in prompts[:900]])
    within = same & ~torch.eye(900, dtype=torch.bool)
    assert float((apart[within] <= 1).float().mean()) == pytest.approx(SHARE, abs=2e-3)
    assert float((apart[~same] <= 1).float().mean()) < 0.05  # eight deviations apart, and five are let pass
    torch.testing.assert_close(found[:, :2].norm(), found.norm(), rtol=0.05, atol=0)


def test_a_prompt_that_changes_little_is_none_of_them():
    assert asking(*made("ab", spread=0.5)) is None
    states, prompts, questions = made("abcd")
    states[900:1200, :2] -= 8.0  # d asks what a asks, in other words
    found = asking(states, prompts, questions)
    assert found.shape == (2, 24)
    a, d = (states[i : i + 300].mean(dim=0) for i in (0, 900))
    assert (found @ (a - d)).norm() < 0.1


def test_prompts_that_are_asked_once_tell_nothing():
    states, prompts, questions = made("ab", 40)
    assert asking(states, prompts, questions) is not None
    assert asking(states, [str(i) for i in range(100)], questions) is None
    assert asking(states[:1].expand(100, -1), prompts, questions) is None  # all in the same place
    few = [*range(LEAST - 1), *range(40, 40 + LEAST - 1), *range(80, 100)]  # one prompt with enough cases
    assert asking(states[few], [prompts[i] for i in few], [questions[i] for i in few]) is None
    with pytest.raises(ValueError, match="100 states, but 3 prompts and 100 questions"):
        asking(states, list("abc"), questions)


def test_nothing_is_told_apart_where_nothing_says_which_wordings_ask_the_same():
    states, prompts, questions = made("ab")
    assert asking(states, prompts, [None] * len(states)) is None
    assert asking(states, prompts, [q if q is None or q < LEAST - 1 else None for q in questions]) is None
    assert asking(states, prompts, ["the same" if p == "a" else None for p in prompts]) is None  # in the same words


def test_a_question_in_other_words_is_let_pass_however_far_its_words_move_it():
    states, prompts, questions = made("ab")
    found = asking(states, prompts, questions)
    a, b = states[:300].mean(dim=0), states[300:600].mean(dim=0)
    assert (found @ (a - b)).norm() > 1.5
    questions[300:320] = range(20)  # b is a, in other words
    told = asking(states, prompts, questions)
    assert float((told @ (states[:20] - states[300:320]).T).norm(dim=0).max()) <= 1.001
    torch.testing.assert_close(told / told.norm(), found / found.norm())


def test_a_question_may_be_that_of_many_cases():
    """Not every pair of hundreds is looked at, but pairs of all their wordings are."""
    states, prompts, _ = made("ab")
    told = asking(states, prompts, [f"{i // 30}" for i in range(300)] * 2 + ["none"] * 20)
    apart = torch.cdist(states[:300] @ told.T, states[300:600] @ told.T)
    assert float((apart <= 1).float().mean()) > 0.99


def test_more_features_than_cases_make_up_no_difference():
    """240 cases with 4,000 features can be told apart by any label; what is found would hold for no other case."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(240, 4000, generator=generator)
    assert asking(states, [str(i % 3) for i in range(240)], [i // 2 for i in range(240)]) is None


def make_router(config, asks, groups=2):
    calibration = Calibration(2, torch.zeros(4), torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    calibration.asking = asks
    router = Router.fitting(calibration, config, groups, torch.zeros(4))
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


def test_without_edits_none_acts_whatever_is_asked():
    router, calibration = make_router(RoutingConfig(mode="routed"), torch.randn(1, 4), groups=0)
    router.load(torch.zeros(0, 4), calibration)
    assert router(torch.randn(3, 4))[1].flatten().tolist() == [-1, -1, -1]


def test_autocast_does_not_round_what_is_asked():
    """Far along a direction, half precision would move a case by more than what tells two questions apart."""
    generator = torch.Generator().manual_seed(0)
    asks, edit = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[700.0, 900.0, 0.0, 0.0]])
    near = edit + torch.rand(64, 4, generator=generator) * torch.tensor([2.0, 1.0, 1.0, 1.0])
    router, calibration = make_router(RoutingConfig(mode="routed", cohort=1, margin=-2.0, false_accept_rate=0.5), asks)
    router.load(edit, calibration)
    plain = router(near)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = router(near)
    assert all(torch.equal(a, b) for a, b in zip(plain, rounded, strict=True))
    assert 0 < int((plain[1] >= 0).sum()) < len(near)


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
    """Of two questions about 24 pictures, the first in two wordings: that is seen by its answers."""
    editor = make_editor("blip2")
    assert editor.edit(make_requests("blip2", 1), progress=False).calibration.asking is None  # four cases a prompt
    asked = [{**ask("blip2", QUESTIONS[w], 20 + i), "target": TARGETS[i % 6]} for i in range(24) for w in range(2)]
    editor.build_memory([t | {"prediction": "the car"} for t in asked], progress=False)
    editor.fit(progress=False)
    editor.calibrate([ask("blip2", QUESTIONS[2], 20 + i) for i in range(24)], progress=False)
    edits = editor.edit(make_requests("blip2", 1), progress=False)
    found = edits.calibration.asking
    assert found is not None
    assert torch.equal(found, asking(editor.cases, editor.prompts, [i // 2 for i in range(48)] + [None] * 24))
    editor.save(tmp_path / "editor.safetensors")
    again = make_editor("blip2")
    again.load(tmp_path / "editor.safetensors")
    assert torch.equal(again.edit(make_requests("blip2", 1), progress=False).calibration.asking, found)
    edits.save_pretrained(tmp_path / "edits")
    loaded = Edits.from_pretrained(tmp_path / "edits")
    assert torch.equal(loaded.calibration.asking, found)
    with uk.patch(editor.model, loaded, routing="routed") as handle:
        assert torch.equal(handle.record.layers[0].router.asking, found)
    labelled = [t | {"question": str(i)} for i, t in enumerate(asked)]  # what the triplets say themselves comes first
    editor.build_memory([t | {"prediction": "the car"} for t in labelled], progress=False)
    editor.fit(progress=False)
    editor.calibrate([ask("blip2", QUESTIONS[2], 20 + i) for i in range(24)], progress=False)
    assert editor.edit(make_requests("blip2", 1), progress=False).calibration.asking is None
