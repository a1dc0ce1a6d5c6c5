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
    ],
)
def test_impossible_values_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        change()
