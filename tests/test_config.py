"""Hyper-parameters: JSON in and out, and values that cannot be."""

import json
from dataclasses import replace

import pytest

from unike_kernels.config import EncoderConfig, NeuronConfig, RoutingConfig, ShiftConfig, UnikeConfig


def test_json_round_trip():
    config = UnikeConfig(
        layers=(1, 3),
        shift=ShiftConfig(k=7, alpha=0.25, clamp=False),
        routing=RoutingConfig(mode="routed", top=2),
        encoders=EncoderConfig(activation="gelu"),
        neurons=NeuronConfig(per_layer=3, beta=1),
    )
    assert UnikeConfig.from_json(json.loads(config.dumps())) == config
    assert UnikeConfig.from_json({}) == UnikeConfig()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"shift": {"kk": 1}}, "kk"),
        ({"else": 1}, "else"),
        ({"shift": {"enabled": "no"}}, "'no'"),
        ({"shift": {"enabled": 1}}, "enabled"),
        ({"shift": {"alpha": "x"}}, "'x'"),
        ({"shift": {"k": True}}, "True"),
        ({"neurons": {"steps": 2.5}}, "2.5"),
        ({"routing": {"mode": "sometimes"}}, "'sometimes'"),
        ({"shift": None}, "ShiftConfig must be an object, but is None"),
        ({"layers": 3}, "layers must be a list of layer numbers or null, but is 3"),
        ({"layers": "12"}, "layers must be a list of layer numbers or null, but is '12'"),
    ],
)
def test_wrong_json_is_refused_by_name(data, named):
    with pytest.raises(ValueError, match=named):
        UnikeConfig.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda: ShiftConfig(k=-1),
        lambda: ShiftConfig(per="layer"),
        lambda: ShiftConfig(orientation="up"),
        lambda: RoutingConfig(top=0),
        lambda: RoutingConfig(false_accept_rate=1.0),
        lambda: RoutingConfig(margin=-3.0),
        lambda: RoutingConfig(cohort=0),
        lambda: NeuronConfig(per_layer=0),
        lambda: NeuronConfig(key_threshold=1.0),
        lambda: EncoderConfig(anchor="h_pos"),
        lambda: EncoderConfig(w_zeta="free"),
        lambda: EncoderConfig(held_out_by="artist"),
        lambda: replace(NeuronConfig(), steps=0),
        lambda: NeuronConfig(margin=float("inf")),  # JSON has none: the edits could not be saved
        lambda: NeuronConfig(lr_values=float("nan")),
        lambda: NeuronConfig(lr_keys=-1.0),
        lambda: ShiftConfig(alpha=float("nan")),
        lambda: EncoderConfig(temperature=0.0),
        lambda: EncoderConfig(held_out=1.0),
        lambda: UnikeConfig(layers=(1.5,)),
        lambda: UnikeConfig(layers="12"),
        lambda: UnikeConfig(layers=(-1,)),
        lambda: UnikeConfig(layers=()),
    ],
)
def test_impossible_values_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        change()


def test_differences_are_of_what_acts_on_a_patched_model():
    ours = UnikeConfig()
    assert ours.differences(replace(ours, neurons=NeuronConfig(steps=3), encoders=EncoderConfig(steps=3))) == []
    theirs = replace(ours, shift=ShiftConfig(k=3, per="token"), neurons=NeuronConfig(beta=0.9))
    assert ours.differences(theirs) == ["shift.k: 40 and 3", "shift.per: case and token", "neurons.beta: 0.1 and 0.9"]
    routed = replace(ours, routing=RoutingConfig(mode="routed"))
    assert ours.differences(replace(ours, routing=RoutingConfig(top=3))) == []  # nothing is routed
    assert routed.differences(replace(ours, routing=RoutingConfig("routed", top=3))) == ["routing.top: 1 and 3"]
    assert routed.differences(ours) == ["routing.mode: routed and always"]
