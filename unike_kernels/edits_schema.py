"""What edits consist of: the records of an edit and of its base, the tensors of a layer, the header on disk.

Sizes: E edits, d hidden size, n neurons of one layer over all edits, N items of the memory, M calibration cases, r
directions of wording, a of what is asked.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from types import UnionType
from typing import Any, get_args, get_origin

import torch

from unike_kernels.config import UnikeConfig

FORMAT_VERSION = 1
PER_EDIT = ("zeta", "h_sem", "h_pos")  # of LayerEdits: one row per edit; the others have one per neuron
_MAX_ENCODER_MAPS = 16  # two are published; a limit, since a file must not make its reader loop


class EditsError(ValueError):
    """Edits that contradict themselves, each other, their base, or what was asked of them."""


@dataclass(frozen=True)
class EditEntry:
    """What one edit asked for and how its editing ended; `image` names the picture (or is its digest)."""

    id: str
    prompt: str
    target: str
    image: str | None
    neurons: dict[int, int]  # decoder layer -> size of its group there; 0 is allowed
    loss: float | None  # reached at the end
    success: bool  # every target token top-1 at the end
    steps: int

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        return {**asdict(self), "neurons": {str(layer): n for layer, n in self.neurons.items()}}

    @classmethod
    def from_json(cls, data: Any) -> "EditEntry":
        """The entry from `to_json`'s values; anything else is an EditsError."""
        data = checked("an entry", data, _ENTRY)
        layers = [int(layer) if layer.isascii() and layer.isdecimal() else layer for layer in data["neurons"]]
        return cls(**{**data, "neurons": dict(zip(layers, data["neurons"].values(), strict=True))})

    def check(self) -> None:
        """Raise an EditsError unless id, sizes and loss are possible ones."""
        if not self.id or not isinstance(self.id, str):
            raise EditsError(f"an edit's id must be a text that is not empty, but got {self.id!r}")
        for layer, n in self.neurons.items():
            if type(layer) is not int or type(n) is not int or n < 0:
                raise EditsError(f"edit {self.id!r}: neurons must map layers to sizes, but has {layer!r}: {n!r}")
        if self.loss is not None and not math.isfinite(self.loss):
            raise EditsError(f"edit {self.id!r}: loss must be finite or None, but is {self.loss}")


@dataclass(frozen=True)
class BaseFingerprint:
    """The base model that edits belong to: its architecture, and a sampled probe of its weights."""

    family: str
    hidden_size: int
    ffn_size: int
    num_layers: int
    gated: bool
    act: str
    heads: int
    kv_heads: int
    head_dim: int
    name_or_path: str | None
    probe: tuple[float, ...]  # a few base weights of the edited layers, rounded

    def mismatches(self, other: "BaseFingerprint") -> list[str]:
        """The architecture fields that differ, each with both values; name and probe are not architecture."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} and {getattr(other, f.name)!r}"
            for f in fields(self)
            if f.name not in ("name_or_path", "probe") and getattr(self, f.name) != getattr(other, f.name)
        ]

    def same_probe(self, other: "BaseFingerprint") -> bool:
        """Whether the sampled weights are equal; they may differ for good reasons (precision, a merged adapter)."""
        return self.probe == other.probe

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        return {**asdict(self), "probe": list(self.probe)}

    @classmethod
    def from_json(cls, data: Any) -> "BaseFingerprint":
        """The fingerprint from `to_json`'s values; anything else is an EditsError."""
        data = checked("base", data, _BASE)
        for value in data["probe"]:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise EditsError(f"base: probe must hold finite numbers, but has {value!r}")
        return cls(**{**data, "probe": tuple(float(value) for value in data["probe"])})

    def check(self) -> None:
        """Raise an EditsError unless every size is at least 1."""
        for f in fields(self):
            if f.type is int and getattr(self, f.name) < 1:
                raise EditsError(f"base: {f.name} must be at least 1, but is {getattr(self, f.name)}")


@dataclass(eq=False)
class LayerEdits:
    """All edits' tensors at one decoder layer; edit e owns the neurons group_ptr[e] to group_ptr[e + 1]."""

    keys: torch.Tensor  # [n, d]; of a gated FFN: the rows of gate_proj
    key_bias: torch.Tensor  # [n]
    values: torch.Tensor  # [n, d]
    group_ptr: torch.Tensor  # [E + 1] int64
    zeta: torch.Tensor  # [E, d], zeta' of each group; zeros when it is not used
    up: torch.Tensor | None  # [n, d], the rows of up_proj; None unless the FFN is gated
    up_bias: torch.Tensor | None  # [n]
    h_sem: torch.Tensor  # [E, d], each edit's own memory item: tap states
    h_pos: torch.Tensor  # [E, d]

    def take(self, edits: list[int]) -> "LayerEdits":
        """Copies of these edits' tensors, in this order."""
        device, ptr = self.group_ptr.device, self.group_ptr.tolist()
        groups = torch.tensor(edits, dtype=torch.int64, device=device)
        rows = torch.tensor([row for e in edits for row in range(ptr[e], ptr[e + 1])], dtype=torch.int64, device=device)
        sizes = torch.tensor([0, *(ptr[e + 1] - ptr[e] for e in edits)], dtype=torch.int64, device=device)
        taken: dict[str, Any] = {"group_ptr": sizes.cumsum(0)}
        for f in fields(self):
            tensor = getattr(self, f.name)
            if f.name != "group_ptr":
                index = groups if f.name in PER_EDIT else rows
                taken[f.name] = None if tensor is None else tensor.detach()[index]
        return LayerEdits(**taken)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "LayerEdits":
        """fn of every tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return LayerEdits(**{name: None if tensor is None else fn(tensor) for name, tensor in tensors.items()})

    @staticmethod
    def cat(parts: list["LayerEdits"]) -> "LayerEdits":
        """One layer with the edits of all parts, in order; all or none of the parts are gated."""

        def joined(name: str) -> Any:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        sizes = torch.cat([parts[0].group_ptr[:1], *(part.group_ptr.diff() for part in parts)])
        names = [f.name for f in fields(LayerEdits) if f.name != "group_ptr"]
        return LayerEdits(group_ptr=sizes.cumsum(0), **{name: joined(name) for name in names})


@dataclass(eq=False)
class LayerShared:
    """What all edits share at one decoder layer: the memory and the semantic encoder."""

    h_sem: torch.Tensor  # [N, d]
    h_pos: torch.Tensor  # [N, d]
    encoder: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # maps (weight [d, d], bias [d]); empty: none fitted

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "LayerShared":
        """fn of every tensor."""
        maps = tuple((fn(weight), fn(bias)) for weight, bias in self.encoder)
        return LayerShared(fn(self.h_sem), fn(self.h_pos), maps)


@dataclass(eq=False)
class Calibration:
    """Taps of training-split case tokens at the first edited layer: what a routing threshold is calibrated on."""

    layer: int
    center: torch.Tensor  # [d], subtracted before the cosine
    cases: torch.Tensor  # [M, d]
    wording: torch.Tensor | None = None  # [r, d] W: a tap less the center counts as x - W^T W x; None: as it is
    asking: torch.Tensor | None = None  # [a, d] A: two such taps ask the same where |A (x - y)| <= 1; None: all do

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(layer, M, r, a)."""
        wording, asking = (0 if part is None else len(part) for part in (self.wording, self.asking))
        return self.layer, len(self.cases), wording, asking

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Calibration":
        """fn of every tensor."""
        parts = (None if part is None else fn(part) for part in (self.wording, self.asking))
        return Calibration(self.layer, fn(self.center), fn(self.cases), *parts)


@dataclass(frozen=True)
class Header:
    """Everything about edits but their tensors: what edit_config.json says, and from which every shape follows."""

    config: UnikeConfig
    base: BaseFingerprint
    entries: tuple[EditEntry, ...]
    layers: tuple[int, ...]
    items: int  # N
    encoder_maps: int  # of each layer's encoder
    calibration: tuple[int, int, int, int] | None  # (layer, M, r, a)

    def check(self) -> None:
        """Raise an EditsError, naming both values, if entries, layers, base and calibration contradict each other."""
        self.base.check()
        if not self.layers:
            raise EditsError("edits need at least one decoder layer")
        if list(self.layers) != sorted(set(self.layers)):
            raise EditsError(f"layers must be distinct and in order, but are {list(self.layers)}")
        for layer in (self.layers[0], self.layers[-1]):
            if not 0 <= layer < self.base.num_layers:
                raise EditsError(f"layer {layer} does not exist: the base has {self.base.num_layers} layers, from 0")
        if self.items < 0:
            raise EditsError(f"items must be at least 0, but is {self.items}")
        if not 0 <= self.encoder_maps <= _MAX_ENCODER_MAPS:
            raise EditsError(f"encoder_maps must be from 0 to {_MAX_ENCODER_MAPS}, but is {self.encoder_maps}")
        if self.calibration and self.calibration[0] != self.layers[0]:
            raise EditsError(
                f"calibration belongs to the first edited layer, {self.layers[0]}, but names {self.calibration[0]}"
            )
        seen = set()
        for entry in self.entries:
            entry.check()
            if entry.id in seen:
                raise EditsError(f"two edits have the id {entry.id!r}")
            seen.add(entry.id)
            if set(entry.neurons) != set(self.layers):
                raise EditsError(
                    f"edit {entry.id!r} has groups at layers {sorted(entry.neurons)}, "
                    f"but the edited layers are {list(self.layers)}"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor; `group_ptr` is int64, all others are floating."""
        d, edits = self.base.hidden_size, len(self.entries)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            n = sum(entry.neurons[layer] for entry in self.entries)
            own: dict[str, tuple[int, ...]] = {"keys": (n, d), "key_bias": (n,), "values": (n, d)}
            if self.base.gated:
                own |= {"up": (n, d), "up_bias": (n,)}
            own |= {"group_ptr": (edits + 1,), "zeta": (edits, d), "h_sem": (edits, d), "h_pos": (edits, d)}
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
            common: dict[str, tuple[int, ...]] = {"h_sem": (self.items, d), "h_pos": (self.items, d)}
            for i in range(self.encoder_maps):
                common |= {f"encoder.{i}.weight": (d, d), f"encoder.{i}.bias": (d,)}
            shapes |= {f"shared.{layer}.{name}": shape for name, shape in common.items()}
        if self.calibration:
            _, cases, wording, asking = self.calibration
            shapes |= {"calibration.center": (d,), "calibration.cases": (cases, d)}
            shapes |= {"calibration.wording": (wording, d)} if wording else {}
            shapes |= {"calibration.asking": (asking, d)} if asking else {}
        return shapes

    def to_json(self) -> dict[str, Any]:
        """The header as plain JSON values."""
        calibration = self.calibration and dict(zip(_CALIBRATION, self.calibration, strict=True))
        return {
            "format_version": FORMAT_VERSION,
            "package_version": package_version(),
            "config": self.config.to_json(),
            "base": self.base.to_json(),
            "entries": [entry.to_json() for entry in self.entries],
            "layers": list(self.layers),
            "items": self.items,
            "encoder_maps": self.encoder_maps,
            "calibration": calibration,
        }

    @classmethod
    def from_json(cls, data: Any) -> "Header":
        """The checked header from `to_json`'s values; an EditsError says what is wrong with any others."""
        found = data.get("format_version") if isinstance(data, dict) else None
        if found is not None and found != FORMAT_VERSION:
            raise EditsError(f"format_version is {found!r}, but this package reads {FORMAT_VERSION}")
        data = checked("the document", data, _HEADER)
        if not all(type(layer) is int for layer in data["layers"]):
            raise EditsError(f"layers must be whole numbers, but are {short(data['layers'])}")
        calibration = data["calibration"]
        if calibration is not None:
            calibration = checked("calibration", calibration, _CALIBRATION)
            for name in ("cases", "wording", "asking"):
                if calibration[name] < 0:
                    raise EditsError(f"calibration: {name} must be at least 0, but is {calibration[name]}")
            calibration = tuple(calibration[name] for name in _CALIBRATION)
        try:
            config = UnikeConfig.from_json(data["config"])
        except (TypeError, ValueError) as err:  # a TypeError where a value has a type that its field cannot have
            raise EditsError(f"config: {err}") from err
        header = cls(
            config=config,
            base=BaseFingerprint.from_json(data["base"]),
            entries=tuple(EditEntry.from_json(entry) for entry in data["entries"]),
            layers=tuple(data["layers"]),
            items=data["items"],
            encoder_maps=data["encoder_maps"],
            calibration=calibration,
        )
        header.check()
        return header


_NONE = type(None)
_IN_JSON: dict[Any, tuple[type, ...]] = {float: (float, int), tuple: (list,)}  # every other type is itself


def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """What JSON types the fields of a dataclass may have."""
    kinds = {}
    for f in fields(cls):
        hint: Any = f.type
        parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = [get_origin(part) or part for part in parts]
        kinds[f.name] = tuple(kind for part in plain for kind in _IN_JSON.get(part, (part,)))
    return kinds


_ENTRY, _BASE = _kinds(EditEntry), _kinds(BaseFingerprint)
_CALIBRATION: dict[str, tuple[type, ...]] = dict.fromkeys(("layer", "cases", "wording", "asking"), (int,))
_HEADER: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "package_version": (str,),
    "config": (dict,),
    "base": (dict,),
    "entries": (list,),
    "layers": (list,),
    "items": (int,),
    "encoder_maps": (int,),
    "calibration": (dict, _NONE),
}


def checked(owner: str, data: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """data, if it is a dict with exactly these keys and types (a bool is no int); an EditsError otherwise."""
    if type(data) is not dict:
        raise EditsError(f"{owner} must be a JSON object, but is {short(data)}")
    unknown, missing = sorted(set(data) - set(kinds)), sorted(set(kinds) - set(data))
    if unknown:
        raise EditsError(f"{owner} has unknown keys: {short(unknown)}; known: {', '.join(sorted(kinds))}")
    if missing:
        raise EditsError(f"{owner} lacks {', '.join(missing)}")
    for name, allowed in kinds.items():
        if type(data[name]) not in allowed:
            wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in allowed)
            raise EditsError(f"{owner}: {name} must be {wanted}, but is {short(data[name])}")
    return data


def short(value: Any, limit: int = 120) -> str:
    """value's repr, cut for a message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def half_character(text: str) -> str:
    """The first half of a character that text holds, as JSON can ("\\ud800") and no tokenizer takes; "" without any."""
    return next((c for c in text if "\ud800" <= c <= "\udfff"), "")


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Names for a message: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(repr(name) for name in names[:limit]) or "none") + more


def package_version() -> str:
    """Of the installed package; "not installed" where it is run from its source alone."""
    # Not unike_kernels.__version__: the package itself is a higher layer than this file.
    try:
        return version("unike-kernels")
    except PackageNotFoundError:
        return "not installed"
