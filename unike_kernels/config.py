"""Every hyper-parameter of UniKE, each with its source; frozen dataclasses, JSON in and out."""

import json
import math
import operator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def _above_0(owner: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{owner}.{name} must be above 0, but got {value}")


def _one_of(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}")


def _finite(part: object) -> None:
    """ValueError for a number of a config that is infinite or none."""
    for f in fields(part):  # type: ignore[arg-type]  # one of the dataclasses below
        value = getattr(part, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{type(part).__name__}.{f.name} must be a finite number, but got {value}")


def _at_least(owner: str, name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{owner}.{name} must be at least {low}, but got {value}")


@dataclass(frozen=True)
class ShiftConfig:
    """How retrieved knowledge shifts a self-attention output (equations 2, 7, 8; spec section 2).

    Measured on the development split of the emoji benchmark (50 edits of base model 1, UniKE always on; Rel / T-Gen /
    M-Gen / T-Loc / M-Loc; `python -m bench.quality.run --rows measure --seeds 1`), the first of each is the default:
    attention: projected 100.0 / 97.9 / 99.5 / 98.5 / 83.9, raw 100.0 / 96.0 / 97.5 / 96.3 / 76.8.
    per: case as above, token 100.0 / 96.6 / 98.6 / 98.2 / 83.5.
    positions: all as above, from_case_token 100.0 / 98.2 / 98.8 / 97.4 / 80.3 (and causal).
    """

    enabled: bool = True
    k: int = 40  # items retrieved; the paper's value
    attention: Literal["projected", "raw"] = "projected"  # "raw" is the published code's form
    alpha: float | None = None  # None: adaptive (equation 7); a number: fixed (Figure 4b)
    per: Literal["case", "token"] = "case"  # one retrieval and one alpha per case (the paper), or per token
    positions: Literal["all", "from_case_token"] = "all"  # which tokens of a case are shifted
    orientation: Literal["knowledge", "input"] = (
        "knowledge"  # what alpha multiplies; "input" is equation 7 to the letter
    )
    clamp: bool = True  # alpha into [0, 1]; equation 7 to the letter does not clamp
    own_item: bool = True  # an edit's own (h_sem, h_pos) is an item of the memory

    def __post_init__(self) -> None:
        _finite(self)
        _at_least("ShiftConfig", "k", self.k, 0)
        _one_of("ShiftConfig", "attention", self.attention, ("projected", "raw"))
        _one_of("ShiftConfig", "per", self.per, ("case", "token"))
        _one_of("ShiftConfig", "positions", self.positions, ("all", "from_case_token"))
        _one_of("ShiftConfig", "orientation", self.orientation, ("knowledge", "input"))


@dataclass(frozen=True)
class RoutingConfig:
    """Which edits act on which case (spec section 3): all of them, or the nearest ones above a calibrated threshold."""

    mode: Literal["always", "routed"] = "always"  # "always" is the paper
    top: int = 1  # at most this many edits act on one case; our prototype's value
    # development split, mean of the five metrics with one edit / 20 at once: names of base models 0 and 1, captions
    # (`python -m bench.quality.run --rows measure --points routing`, `--task caption`): whatever is asked, margin 0.15:
    # 97.6 / 97.2, 98.5 / 98.2, 97.9 / 97.8, 98.9 / 98.7. Where the same is asked, margins of 0.2, 0.15, 0.1 and 0.05:
    # 97.3 / 97.3, 98.0 / 98.0, 98.0 / 98.0, 98.4 / 98.5; 97.4 / 97.3, 98.7 / 98.5, 98.9 / 98.4, 98.9 / 98.4;
    # 98.0 / 98.0, 98.5 / 98.4, 98.7 / 98.3, 98.7 / 98.2; 98.7 / 98.6, 99.0 / 98.8, 99.2 / 98.8, 99.2 / 98.8.
    # Rate and cohort are for hundreds of edits, where they decide; with a thousand reported edits rates of 0.003, 0.004
    # and 0.005 gave M-Gen 49 / 57, 65 / 66, 69 / 71 and M-Loc 99.6 / 99.5, 99.0 / 99.2, 98.8 / 98.9, whatever is asked
    false_accept_rate: float = 0.004  # share of training-split cases that any edit may claim
    cohort: int = 64  # the training-split cases nearest to a case, whose mean likeness an edit's is held against
    margin: float = 0.05  # by which it has to be greater, however few edits there are; -2: no matter
    asking: bool = True  # only where the case asks what the edit asks, as far as training prompts tell the two apart

    def __post_init__(self) -> None:
        _finite(self)
        _one_of("RoutingConfig", "mode", self.mode, ("always", "routed"))
        _at_least("RoutingConfig", "top", self.top, 1)
        if not 0.0 <= self.false_accept_rate < 1.0:
            raise ValueError(f"RoutingConfig.false_accept_rate must be in [0, 1), but got {self.false_accept_rate}")
        if not -2.0 <= self.margin <= 2.0:  # two cosines are never further apart
            raise ValueError(f"RoutingConfig.margin must be in [-2, 2], but got {self.margin}")
        _at_least("RoutingConfig", "cohort", self.cohort, 1)


@dataclass(frozen=True)
class EncoderConfig:
    """How Enc_sem, Enc_tru and W_zeta are fitted (equations 4 and 5).

    Measured as in ShiftConfig (mean of the five metrics), the first of each is the default:
    activation: identity 96.0, gelu 96.1, relu 95.6: no activation gains a point, so affine, as published.
    anchor: h_att 96.0 with a mean alpha of 0.23 on the edits, h_sem 95.8 with one of 0.02.
    w_zeta: decoder 96.0, trained 95.4.
    """

    temperature: float = 0.1  # of the cosine similarity; the paper gives none
    activation: Literal["identity", "relu", "gelu"] = "identity"  # two affine maps, as published
    anchor: Literal["h_att", "h_sem"] = "h_att"  # the space where equation 7 compares; "h_sem" is the paper's letter
    steps: int = 300  # ours, as the next three
    batch_size: int = 128  # the triplets that equations 4 and 5 sum over in one step
    lr: float = 1e-3  # AdamW, falling to 0 along a cosine
    weight_decay: float = 1e-2
    held_out: float = 0.1  # share of the answers, or of the triplets, that only measure the fit
    # "answer": all triplets of an answer are held out together, so that its words are new to the encoders (the harder
    # test: mean AUC 0.85 to 0.91 over base models and layers); "triplet": one by one (0.93 to 0.96)
    held_out_by: Literal["answer", "triplet"] = "answer"
    w_zeta: Literal["decoder", "trained"] = "decoder"  # from the truthfulness space to the states, or over edits
    ridge: float = 1e-2  # ours, of the linear decoder; relative to the mean squared singular value
    w_zeta_edits: int = 128  # training-split edits that a trained W_zeta is learned over
    lr_w_zeta: float = 1e-3  # ours, Adam, of a trained W_zeta
    seed: int = 0

    def __post_init__(self) -> None:
        _finite(self)
        _one_of("EncoderConfig", "anchor", self.anchor, ("h_att", "h_sem"))
        _one_of("EncoderConfig", "activation", self.activation, ("identity", "relu", "gelu"))
        _one_of("EncoderConfig", "w_zeta", self.w_zeta, ("decoder", "trained"))
        _one_of("EncoderConfig", "held_out_by", self.held_out_by, ("answer", "triplet"))
        for name, low in (("steps", 1), ("batch_size", 1), ("w_zeta_edits", 1), ("weight_decay", 0.0), ("ridge", 0.0)):
            _at_least("EncoderConfig", name, getattr(self, name), low)
        for name in ("temperature", "lr", "lr_w_zeta"):
            _above_0("EncoderConfig", name, getattr(self, name))
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"EncoderConfig.held_out must be in [0, 1), but got {self.held_out}")


@dataclass(frozen=True)
class NeuronConfig:
    """How the extra FFN neurons of one edit are made and trained (equations 3 and 6; spec section 3)."""

    enabled: bool = True  # False: only the edit's own memory item is added (latent-IKE alone)
    per_layer: int = 10  # ne; the published code's first MiniGPT-4 settings
    beta: float = 0.1  # of zeta' on the values; hard-coded in the published code (its yaml says 0.9, never read)
    # development split, always on, T-Gen / M-Loc: 0.5 gave 97.8 / 79.2, 0.7 gave 97.9 / 83.9
    key_threshold: float = 0.7  # a neuron is just active where a state's projection on its key exceeds this share
    center_keys: bool = True  # project on the state minus the mean FFN input of all triplets' questions
    key_noise: float = 0.1  # ours, relative; equal keys with zero values would stay copies
    # Adam's rates, our prototype's values. Fast keys generalise, slow ones leave more alone, and which is better is
    # up to the model: always on, 3e-3 for both gave 97 in the place of 95 on the emoji models' development split
    # (mean of five; M-Loc 91 for 81), but T-Gen 61 in the place of 91 on facts as text for SmolLM2-135M (T-Loc 88 for
    # 79). Where edits are routed, the router sees to locality, and 1e-2 was best (bench/quality/results/notes.md)
    lr_values: float = 1e-2
    lr_keys: float = 1e-2
    lr_zeta: float = 0.0  # above 0: zeta' is learned per edit (its direction then cannot matter: see the spec)
    # an edit stops when it is there, after 16 steps in the mean; 25 (the spec) left 5 of 50 development edits short of
    # their target; 50 left 6 % of the reported names of base model 0 (Table 1's exact Rel was 94.0), 200 none (100.0)
    steps: int = 200  # at most
    # 1 (the spec's least) gave T-Gen 95.8 and M-Gen 95.4 on the development split, 2 gave 97.9 and 98.0
    margin: float = 2.0  # stop when every target token is top-1 by this logit margin
    # independent edits trained together; memory grows with it. 128 of the benchmark's small model (3072 tokens) take
    # two thirds of the CPU time that they take in batches of 32 (`python -m bench.quality.run --speed`)
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _finite(self)
        _at_least("NeuronConfig", "per_layer", self.per_layer, 1)
        for name in ("key_noise", "lr_values", "lr_keys", "lr_zeta"):
            _at_least("NeuronConfig", name, getattr(self, name), 0.0)
        _at_least("NeuronConfig", "steps", self.steps, 1)
        _at_least("NeuronConfig", "batch_size", self.batch_size, 1)
        if not 0.0 <= self.key_threshold < 1.0:
            raise ValueError(f"NeuronConfig.key_threshold must be in [0, 1), but got {self.key_threshold}")


@dataclass(frozen=True)
class UnikeConfig:
    """All of it: what a patch needs (shift, routing, neurons.beta) and what making edits needs (the rest)."""

    layers: tuple[int, ...] | None = None  # None: the last four decoder layers (the paper)
    shift: ShiftConfig = field(default_factory=ShiftConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    encoders: EncoderConfig = field(default_factory=EncoderConfig)
    neurons: NeuronConfig = field(default_factory=NeuronConfig)

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if layers is None:
            return
        whole = isinstance(layers, tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
        if not whole or min(layers, default=-1) < 0:
            raise ValueError(
                f"UnikeConfig.layers must be a tuple of layer numbers from 0 on, or None, but got {layers!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        out = asdict(self)
        out["layers"] = list(self.layers) if self.layers is not None else None
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "UnikeConfig":
        """The config from `to_json`'s values; missing keys take defaults; ValueError for unknown keys and types."""
        data = dict(data)
        parts: dict[str, Any] = {
            name: _from_dict(part, data.pop(name, {}))
            for name, part in (
                ("shift", ShiftConfig),
                ("routing", RoutingConfig),
                ("encoders", EncoderConfig),
                ("neurons", NeuronConfig),
            )
        }
        layers = data.pop("layers", None)
        if layers is not None and not isinstance(layers, list | tuple):
            raise ValueError(f"layers must be a list of layer numbers or null, but is {layers!r}")
        if data:
            known = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"unknown keys in the config: {', '.join(sorted(data))}; known: {known}")
        return cls(layers=tuple(layers) if layers is not None else None, **parts)

    def differences(self, other: "UnikeConfig") -> list[str]:
        """Settings that act on a patched model and differ, with both values: "neurons.beta: 0.1 and 0.9".

        How edits are made (encoders' and neurons' training) is not among them; routing's limits are where both route.
        """
        names = [f"shift.{f.name}" for f in fields(ShiftConfig)]
        if self.routing.mode == other.routing.mode == "routed":
            names += [f"routing.{f.name}" for f in fields(RoutingConfig)]
        names += ["routing.mode", "encoders.activation", "neurons.beta"]
        found = [(name, operator.attrgetter(name)(self), operator.attrgetter(name)(other)) for name in names]
        return [f"{name}: {ours} and {theirs}" for name, ours, theirs in found if ours != theirs]

    def dumps(self) -> str:
        """The config as a JSON text with sorted keys."""
        return json.dumps(self.to_json(), indent=2, sort_keys=True)


def _from_dict(cls: type[T], data: dict[str, Any]) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} must be an object, but is {data!r}")
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # T is always one of the dataclasses above
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"unknown keys in {cls.__name__}: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for name, value in data.items():
        default = getattr(cls(), name)
        kind: type | tuple[type, ...] = (int, float) if isinstance(default, float) or default is None else type(default)
        right = isinstance(value, kind) and isinstance(value, bool) is isinstance(default, bool)
        if not right and not (value is None and default is None):
            raise ValueError(f"{cls.__name__}.{name} must be of the type of {default!r}, but is {value!r}")
    return cls(**data)
