"""The router: which edits act on a case, by a calibrated threshold and against the nearest training cases."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unike_kernels as uk
from tests.models_tiny import ROUTED, edits_for, inputs_for, make_model
from unike_kernels.config import RoutingConfig
from unike_kernels.edits import Calibration
from unike_kernels.reference_routing import routes
from unike_kernels.routing import Router, average, calibrate, crowding, nearest


def test_calibrate_lets_at_most_the_share_pass():
    generator = torch.Generator().manual_seed(0)
    cases = torch.nn.functional.normalize(torch.randn(200, 8, generator=generator), dim=-1)
    keys = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=-1)
    best = (cases @ keys.T).amax(dim=1)
    for rate in (0.0, 0.01, 0.1, 0.5):
        threshold = calibrate(nearest(cases, keys, cases[:, :0], keys[:, :0]), rate)
        assert (best > threshold).sum() == int(rate * 200)
        fewer = calibrate(nearest(cases, keys[:3], cases[:, :0], keys[:3, :0]), rate)
        assert fewer <= threshold  # more edits, more chances of a false accept
    none = cases[:0, :0]
    assert calibrate(nearest(cases[:0], keys, none, keys[:, :0]), 0.1) == -math.inf
    assert calibrate(nearest(cases, keys[:0], cases[:, :0], none), 0.1) == -1.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_decides_as_the_reference_does(data):
    """Random states, with edits asked again near by, crowded cases, and what wording and question change in them."""
    draw = data.draw
    seed, d = draw(st.integers(0, 10**6)), draw(st.sampled_from([4, 8, 16]))
    n_edits, n_cases = draw(st.integers(0, 8)), draw(st.sampled_from([0, 1, 7, 40]))
    options = {
        "top": draw(st.integers(1, 3)),
        "false_accept_rate": draw(st.sampled_from([0.0, 0.05, 0.3])),
        "cohort": draw(st.sampled_from([1, 4, 64])),
        "margin": draw(st.sampled_from([-2.0, 0.0, 0.1])),
    }
    generator = torch.Generator().manual_seed(seed)

    def states(n, spread=1.0):
        return spread * torch.randn(n, d, generator=generator, dtype=torch.float64)

    edits, cases, center = states(n_edits), states(n_cases), states(1)[0]
    if draw(st.booleans()):  # training cases that ask what edits ask
        same = min(n_edits, n_cases, 3)
        cases[:same] = edits[:same] + states(same, 0.02)
    wording = 0.5 * torch.linalg.qr(states(d))[0][: draw(st.integers(0, 2))]
    asking = states(draw(st.integers(0, 2)), 0.4)
    x = torch.cat([states(6), edits, edits + states(n_edits, 0.1), edits + states(n_edits, 0.5), cases[:3]])
    calibration = Calibration(2, center, cases, wording if len(wording) else None, asking if len(asking) else None)
    router = Router.fitting(calibration.map(torch.Tensor.float), RoutingConfig("routed", **options), 8, x.float())
    router.load(edits.float(), calibration.map(torch.Tensor.float))
    scores, selected = router(x.float())
    rate = options.pop("false_accept_rate")
    expected = routes(x, edits, cases, center, rate=rate, wording=wording, asking=asking, **options)
    torch.testing.assert_close(scores.double(), expected[0], rtol=0, atol=1e-5)
    assert torch.equal(selected, expected[1])


def unit(degrees):
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_an_edit_has_to_be_nearer_than_the_cohort_by_the_margin():
    # a threshold that keeps nothing out here, and a cohort of one: nearer than the nearest training case
    config = RoutingConfig(mode="routed", false_accept_rate=0.5, cohort=1, margin=0.0)
    calibration = Calibration(2, torch.zeros(2), unit([30.0, 180.0]))
    asked = unit([0.0, 10.0, 14.9, 15.1, 20.0])

    def chosen(config):
        router = Router(config, 3, asked, max_cases=2)
        router.load(unit([0.0]), calibration)
        assert router.threshold < -0.1  # 180 degrees reaches -1, less its likeness to 30
        return router(asked)[1].flatten().tolist()

    assert chosen(config) == [0, 0, 0, -1, -1]
    assert chosen(replace(config, margin=-2.0)) == [0] * 5
    assert chosen(replace(config, margin=0.07)) == [0, -1, -1, -1, -1]  # cos 10 is 0.985, cos 20 is 0.940
    assert chosen(replace(config, margin=0.5)) == [0, -1, -1, -1, -1]  # its own question, by however little
    assert chosen(replace(config, cohort=2)) == [0] * 5  # by the mean of 30 and 180 degrees


def test_a_training_case_that_asks_what_an_edit_asks_does_not_compete_with_it():
    calibration = Calibration(2, torch.zeros(2), unit([0.0, 30.0, 180.0]))
    config = RoutingConfig(mode="routed", false_accept_rate=0.5, cohort=1, margin=0.0)
    router = Router(config, 1, calibration.cases, max_cases=3)
    router.load(unit([0.0]), calibration)
    assert router.n_cases.item() == 2
    assert router(unit([0.0, 1.0, 20.0]))[1].flatten().tolist() == [0, 0, -1]


def test_a_case_in_a_crowd_of_training_cases_needs_a_higher_score():
    config = RoutingConfig(mode="routed", false_accept_rate=0.0, margin=-2.0, cohort=2)
    calibration = Calibration(2, torch.zeros(2), unit([60.0, 80.0, 180.0]))
    asked = unit([30.0, -30.0])  # as near to the edit at 0 degrees, the first with two training cases about it
    router = Router(config, 2, asked, max_cases=3)
    router.load(unit([0.0]), calibration)

    def cos(degrees):
        return float(unit([degrees])[0, 0])

    # each training case: its likeness to the edit, less the mean of its likeness to the two others
    reached = [cos(60) - (cos(20) + cos(120)) / 2, cos(80) - (cos(20) + cos(100)) / 2, -1 - (cos(100) + cos(120)) / 2]
    assert router.threshold.item() == pytest.approx(max(reached), abs=1e-6)
    left = [cos(30) - (cos(30) + cos(50)) / 2, cos(30) - (cos(90) + cos(110)) / 2]
    assert left[0] < max(reached) < left[1]
    assert router(asked)[1].flatten().tolist() == [-1, 0]


def test_crowding_leaves_out_the_case_itself_and_other_phrasings_of_it():
    cases = unit([0.0, 1.0, 60.0, 90.0, 180.0])
    cos = cases @ cases.T
    expected = [(cos[i, a] + cos[i, b]) / 2 for i, (a, b) in enumerate([(2, 3), (2, 3), (3, 1), (2, 1), (3, 2)])]
    torch.testing.assert_close(crowding(cases, 2), torch.stack(expected))
    assert crowding(cases[:2], 5).tolist() == [0.0, 0.0]  # nothing else is there
    assert crowding(cases[:0], 5).shape == (0,)
    assert average(torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]])).tolist() == [[0.5], [0.0]]


def test_crowding_is_found_once_for_a_calibration_and_anew_for_another():
    calibration = Calibration(2, torch.zeros(2), unit([60.0, 80.0, 180.0]))
    router = Router(RoutingConfig(mode="routed"), 1, calibration.cases, max_cases=3)
    router.load(unit([0.0]), calibration)
    first, threshold = router._crowds, router.threshold.item()
    router.load(unit([20.0]), calibration)
    assert router._crowds is first
    router.load(unit([20.0]), calibration.map(torch.clone))  # as merged, or read again
    assert router._crowds is first
    router.load(unit([0.0]), calibration)
    assert router.threshold.item() == threshold
    calibration.cases[0] = unit([120.0])[0]  # changed in place
    router.load(unit([0.0]), calibration)
    assert router._crowds is not first and router.threshold.item() != threshold
    moved = Calibration(2, torch.tensor([0.3, 0.1]), calibration.cases)  # the same cases around another centre
    router.load(unit([0.0]), moved)
    fresh = Router(RoutingConfig(mode="routed"), 1, calibration.cases, max_cases=3)
    fresh.load(unit([0.0]), moved)
    assert router.threshold == fresh.threshold
    fewer = Calibration(2, moved.center, moved.cases[:2])
    router.load(unit([0.0]), fewer)
    fresh = Router(RoutingConfig(mode="routed"), 1, fewer.cases, max_cases=2)
    fresh.load(unit([0.0]), fewer)
    assert router.threshold == fresh.threshold


def test_a_calibration_made_in_inference_mode_is_taken_and_followed():
    with torch.inference_mode():
        calibration = Calibration(2, torch.zeros(2), unit([60.0, 80.0, 180.0]))
    router = Router(RoutingConfig(mode="routed"), 1, torch.zeros(2), max_cases=3)
    found = []
    for case in (60.0, 120.0):
        with torch.inference_mode():
            calibration.cases[0] = unit([case])[0]
        router.load(unit([0.0]), calibration)
        plain = Router(router.config, 1, torch.zeros(2), max_cases=3)
        plain.load(unit([0.0]), calibration.map(lambda t: t.clone()))
        assert router.threshold == plain.threshold
        found.append(router.threshold.item())
    assert found[0] != found[1]


def test_a_calibration_without_cases_in_the_room_of_another_decides_as_alone():
    config = RoutingConfig(mode="routed", false_accept_rate=0.5, cohort=1, margin=0.0)
    some, none = (Calibration(2, torch.zeros(2), cases) for cases in (unit([30.0, 180.0]), torch.zeros(0, 2)))
    asked = unit([0.0, 40.0, 89.0, 91.0])
    router, fresh = Router(config, 1, asked, max_cases=2), Router(config, 1, asked)
    router.load(unit([0.0]), some)
    assert router(asked)[1].flatten().tolist() == [0, -1, -1, -1]
    for one in (router, fresh):
        one.load(unit([0.0]), none)
        assert one(asked)[1].flatten().tolist() == [0] * 4  # nothing to protect


def test_router_refuses_more_than_it_has_room_for():
    router = Router(RoutingConfig(mode="routed"), 1, torch.zeros(2), max_cases=2)
    with pytest.raises(ValueError, match="room for 1 edits .* but got 2"):
        router.load(unit([0.0, 90.0]), Calibration(2, torch.zeros(2), unit([30.0])))
    with pytest.raises(ValueError, match="room for 2 calibration cases .* but got 3"):
        router.load(unit([0.0]), Calibration(2, torch.zeros(2), unit([30.0, 60.0, 90.0])))
    assert router.n_groups.item() == 0 and not router.keys.any() and not router.cases.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_keeps_its_precision_when_the_model_changes_its_own(dtype):
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3, 4))
    edits = edits_for(model, ROUTED, prompts={k: v[:2] for k, v in inputs.items()})
    handle = uk.patch(model, edits)
    router = handle.record.layers[0].router
    before = {name: tensor.clone() for name, tensor in router.named_buffers()}
    model.to(dtype).to(torch.float32)
    for name, tensor in router.named_buffers():
        assert torch.equal(tensor, before[name])
    model.to(dtype)
    model(**inputs)
    assert handle.record.runtime.tracker.current.state.selected.tolist() == [[0], [1], [-1]]


def test_more_edits_than_one_may_act():
    model = make_model("llama", dtype=torch.float64)
    inputs = inputs_for(model, (5, 5))
    config = replace(ROUTED, routing=replace(ROUTED.routing, top=2))
    one = {k: v[[0, 0, 1]] for k, v in inputs.items()}
    one["input_ids"] = one["input_ids"].clone()
    edits = edits_for(model, config, prompts=one)
    generator = torch.Generator().manual_seed(1)
    for own in edits.layers.values():  # edit 1 asks almost what edit 0 asks
        own.h_sem[1] = own.h_sem[0] + 1e-3 * torch.randn(own.h_sem.shape[1], generator=generator)
    with uk.patch(model, edits) as handle:
        reports = handle.explain(**inputs)
    assert [[i for i, _ in r.edits] for r in reports] == [edits.ids[:2], edits.ids[2:]]
    assert reports[0].edits[0][1] > reports[0].edits[1][1]
    told = f"{edits.ids[0]} ({reports[0].edits[0][1]:.3f}), {edits.ids[1]} ({reports[0].edits[1][1]:.3f})"
    alphas = ", ".join(f"{layer.alpha:.3f} at layer {layer.layer}" for layer in reports[0].layers)
    assert repr(reports[0]) == f"CaseReport(case 0; edits that act: {told}; alpha: {alphas})"
    assert str(reports[0]).startswith(f"case 0: edits that act: {told}\n")
