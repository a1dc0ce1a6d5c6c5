"""Edits: every tensor of every edit, with the memory, encoders and calibration they share, and the base they belong to.

Sizes: E edits, d hidden size, n neurons of one layer over all edits, N items of the memory, M calibration cases.
"""

from dataclasses import dataclass, fields

import torch

from unike_kernels.config import UnikeConfig


@dataclass(frozen=True)
class EditEntry:
    """What one edit asked for and how its editing ended; `image` names the picture (or its digest), it is not the picture."""

    id: str
    prompt: str
    target: str
    image: str | None
    neurons: dict[int, int]  # decoder layer -> size of its group there; 0 is allowed
    loss: float | None  # reached at the end
    success: bool  # every target token top-1 at the end
    steps: int


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
        """The architecture fields that differ, each with both values; neither the name nor the probe is architecture."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} and {getattr(other, f.name)!r}"
            for f in fields(self)
            if f.name not in ("name_or_path", "probe") and getattr(self, f.name) != getattr(other, f.name)
        ]

    def same_probe(self, other: "BaseFingerprint") -> bool:
        """Whether the sampled weights are equal; another precision or a merged adapter makes them differ legitimately."""
        return self.probe == other.probe


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


@dataclass(eq=False)
class LayerShared:
    """What all edits share at one decoder layer: the memory and the semantic encoder."""

    h_sem: torch.Tensor  # [N, d]
    h_pos: torch.Tensor  # [N, d]
    encoder: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # (weight [d, d], bias [d]) maps; empty: none was fitted


@dataclass(eq=False)
class Calibration:
    """Taps of training-split case tokens at the first edited layer: what a routing threshold is calibrated on."""

    layer: int
    center: torch.Tensor  # [d], subtracted before the cosine
    cases: torch.Tensor  # [M, d]


@dataclass(eq=False)
class Edits:
    """All edits of one base model; layer keys are decoder layer indices, the same in `layers` and `shared`."""

    config: UnikeConfig
    base: BaseFingerprint
    entries: list[EditEntry]
    layers: dict[int, LayerEdits]
    shared: dict[int, LayerShared]
    calibration: Calibration | None = None  # None: routing was never calibrated

    @property
    def ids(self) -> list[str]:
        """The edits' ids, in the order of the groups."""
        return [entry.id for entry in self.entries]

    def __len__(self) -> int:
        return len(self.entries)
