"""Edits: the tensors of every edit, the memory, encoders and calibration they share, and the base they belong to."""

import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from unike_kernels import edits_io
from unike_kernels.config import UnikeConfig
from unike_kernels.edits_io import EditsFileError
from unike_kernels.edits_schema import (
    PER_EDIT,
    BaseFingerprint,
    Calibration,
    EditEntry,
    EditsError,
    Header,
    LayerEdits,
    LayerShared,
    listed,
)

__all__ = [
    "BaseFingerprint",
    "Calibration",
    "EditEntry",
    "Edits",
    "EditsError",
    "EditsFileError",
    "LayerEdits",
    "LayerShared",
    "UnknownEditError",
]

_FLOATS = ", ".join(str(dtype) for dtype in edits_io.FLOATS)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class UnknownEditError(EditsError, KeyError):
    """An id that no edit has."""

    __str__ = ValueError.__str__  # KeyError's would show the message's repr


@dataclass(eq=False, repr=False)
class Edits:
    """All edits of one base model; layer keys are decoder layer indices, the same in `layers` and `shared`.

    No method's result shares a tensor with what it was made from.
    """

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

    @property
    def nbytes(self) -> int:
        """What all tensors together take."""
        return sum(tensor.nbytes for tensor in self.named_tensors().values())

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name on disk: `layers.2.keys`, `shared.2.encoder.0.weight`, `calibration.center`, ..."""
        named: dict[str, torch.Tensor | None] = {}
        for layer, own in self.layers.items():
            named |= {f"layers.{layer}.{f.name}": getattr(own, f.name) for f in fields(own)}
        for layer, shared in self.shared.items():
            named |= {f"shared.{layer}.h_sem": shared.h_sem, f"shared.{layer}.h_pos": shared.h_pos}
            for i, (weight, bias) in enumerate(shared.encoder):
                named |= {f"shared.{layer}.encoder.{i}.weight": weight, f"shared.{layer}.encoder.{i}.bias": bias}
        if self.calibration:
            parts = ("center", "cases", "wording", "asking")
            named |= {f"calibration.{part}": getattr(self.calibration, part) for part in parts}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def select(self, ids: str | Iterable[str]) -> "Edits":
        """The edits with these ids, in this order; UnknownEditError (a KeyError) names an id that no edit has."""
        wanted = [ids] if isinstance(ids, str) else list(ids)
        if twice := _repeated(wanted):
            raise EditsError(f"an edit can be selected once, but these ids came more often: {listed(twice)}")
        return self._take(self._positions(wanted))

    def remove(self, ids: str | Iterable[str]) -> "Edits":
        """All edits but those with these ids; UnknownEditError (a KeyError) names an id that no edit has."""
        gone = set(self._positions([ids] if isinstance(ids, str) else ids))
        return self._take([e for e in range(len(self)) if e not in gone])

    @staticmethod
    def merge(parts: Sequence["Edits"]) -> "Edits":
        """All edits of all parts, in order; what the parts share is stored once.

        An EditsError names every base, config, memory, encoder or calibration that differs, and ids that collide.
        Of two edits with the same image and prompt the later one stays, and a warning names both.
        """
        if not parts:
            raise EditsError("there is nothing to merge")
        for part in parts:
            part.validate()
        first = parts[0]
        for number, part in enumerate(parts[1:], 1):
            if differences := _differences(first, part):
                raise EditsError(f"edits 0 and {number} cannot be merged; they differ in " + "; ".join(differences))
        entries = [entry for part in parts for entry in part.entries]
        if twice := _repeated(entry.id for entry in entries):
            raise EditsError(f"several of the merged edits have the same id: {listed(twice)}")

        newest = {(entry.image, entry.prompt): entry.id for entry in entries}  # later ones overwrite
        kept = []
        for e, entry in enumerate(entries):
            by = newest[entry.image, entry.prompt]
            if by == entry.id:
                kept.append(e)
            else:
                warnings.warn(f"edit {by!r} replaces {entry.id!r}: the same image and prompt", stacklevel=2)
        own = [{layer: edits.map(torch.Tensor.detach) for layer, edits in part.layers.items()} for part in parts]
        joined = {layer: LayerEdits.cat([part[layer] for part in own]) for layer in first.layers}
        merged = Edits(first.config, first.base, entries, joined, first.shared, first.calibration)
        if len(kept) < len(entries):
            return merged._take(kept)
        shared = {layer: part.map(_copy) for layer, part in first.shared.items()}  # `cat` has copied the layers
        return replace(merged, shared=shared, calibration=first.calibration and first.calibration.map(_copy))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Edits":
        """The same edits on a device, in a floating dtype; None leaves either as it is."""
        if dtype is not None and dtype not in edits_io.FLOATS:
            raise EditsError(f"the dtype of edits must be one of {_FLOATS}, but got {dtype}")
        return self._map(
            lambda tensor: tensor.detach().to(
                device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True
            )
        )

    def validate(self) -> None:
        """Raise an EditsError, naming both values, where a tensor does not fit the entries, the base or the others."""
        header = self._header()
        header.check()
        if set(self.shared) != set(self.layers):
            raise EditsError(f"layers has {sorted(self.layers)}, but shared has {sorted(self.shared)}")
        named, shapes = self.named_tensors(), header.shapes()
        if wrong := [name for name in (*shapes, *named) if name not in shapes or name not in named]:
            kind = "gated" if self.base.gated else "not gated"
            raise EditsError(f"with an FFN that is {kind}, these tensors are absent or too many: {listed(wrong)}")
        alike: dict[str, tuple[str, torch.Tensor]] = {}
        for name, tensor in named.items():
            if tuple(tensor.shape) != shapes[name]:
                raise EditsError(f"{name} has shape {list(tensor.shape)}, but must have {list(shapes[name])}")
            if name.endswith(".group_ptr"):
                if tensor.dtype != torch.int64:
                    raise EditsError(f"{name} has dtype {tensor.dtype}, but must have torch.int64")
                continue
            if tensor.dtype not in edits_io.FLOATS:
                raise EditsError(f"{name} has dtype {tensor.dtype}, but must have one of {_FLOATS}")
            other_name, other = alike.setdefault(name.partition(".")[0], (name, tensor))
            if _kind(tensor) != _kind(other):
                raise EditsError(f"{name} is {_kind(tensor)}, but {other_name} is {_kind(other)}")
            if not _finite(tensor):
                raise EditsError(f"{name} holds values that are not finite{self._owner(name, tensor)}")
        for layer, own in self.layers.items():
            ends = [0]
            for entry in self.entries:
                ends.append(ends[-1] + entry.neurons[layer])
            if own.group_ptr.tolist() != ends:
                raise EditsError(
                    f"layers.{layer}.group_ptr is {own.group_ptr.tolist()}, but the entries' sizes give {ends}"
                )

    # On disk and on the hub

    def save_pretrained(self, path: str | os.PathLike[str], *, max_file_bytes: int = edits_io.MAX_FILE_BYTES) -> None:
        """Save into a directory as edits.safetensors (several files above max_file_bytes) and edit_config.json.

        What was saved there before is replaced at once: a kill at any moment leaves the old edits or the new ones. The
        prompts, targets and image names are in edit_config.json, in clear.
        """
        self.validate()
        edits_io.write(Path(path), self._header().to_json(), self.named_tensors(), max_file_bytes)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike[str], revision: str | None = None, *, token: str | None = None
    ) -> "Edits":
        """The edits saved in a directory or, if there is none of that name, in a hub repository (at a revision).

        They are loaded on the CPU, in the dtype they were saved in. EditsFileError names the file and the values where
        something is damaged, contradictory or of an unknown format. No code is run and nothing is unpickled.
        """
        path = Path(path_or_repo)
        if not path.exists() and _REPO.fullmatch(str(path_or_repo)):
            path = edits_io.download(str(path_or_repo), revision, token)
        elif revision is not None:
            raise EditsError(f"a revision ({revision!r}) belongs to a hub repository, but {path} is a local path")

        def parse(document: dict[str, Any]) -> tuple[Header, dict[str, tuple[int, ...]]]:
            header = Header.from_json(document)
            return header, header.shapes()

        header, named = edits_io.read(path, parse)
        edits = cls._from_named(header, named)
        try:
            edits.validate()
        except EditsError as err:
            raise EditsFileError(f"{path}: {err}") from err
        return edits

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload edits",
    ) -> str:
        """Save into a hub repository, made if need be, in one commit; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return edits_io.upload(folder, repo_id, revision=revision, private=private, token=token, message=message)

    # For people

    def summary(self, limit: int | None = None) -> str:
        """A table with one line per edit, the first `limit` of them."""
        header = self._header()
        rows = [("id", "prompt -> target", "neurons", "loss", "success")]
        for entry in self.entries[:limit]:
            rows.append(
                (
                    _cut(entry.id, 24),
                    f"{_cut(entry.prompt, 40)} -> {_cut(entry.target, 24)}",
                    "+".join(str(entry.neurons.get(layer, 0)) for layer in header.layers),
                    "-" if entry.loss is None else f"{entry.loss:.3g}",
                    "yes" if entry.success else "NO",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = (
            f"Edits: {len(self)} of {self.base.name_or_path or self.base.family}, layers {list(header.layers)}, "
            f"{header.items} memory items, {self.nbytes / 1e6:.3g} MB"
        )
        more = [] if len(rows) > len(self) else [f"... and {len(self) + 1 - len(rows)} more"]
        return "\n".join([title, *lines, *more])

    def __repr__(self) -> str:
        return self.summary(limit=10)

    # Inside

    def _header(self) -> Header:
        shared = next(iter(self.shared.values()), None)
        return Header(
            config=self.config,
            base=self.base,
            entries=tuple(self.entries),
            layers=tuple(sorted(self.layers)),
            items=len(shared.h_sem) if shared else 0,
            encoder_maps=len(shared.encoder) if shared else 0,
            calibration=self.calibration.sizes if self.calibration else None,
        )

    @classmethod
    def _from_named(cls, header: Header, named: dict[str, Any]) -> "Edits":
        """The inverse of `named_tensors`."""
        return cls(
            config=header.config,
            base=header.base,
            entries=list(header.entries),
            layers={
                layer: LayerEdits(**{f.name: named.get(f"layers.{layer}.{f.name}") for f in fields(LayerEdits)})
                for layer in header.layers
            },
            shared={
                layer: LayerShared(
                    h_sem=named[f"shared.{layer}.h_sem"],
                    h_pos=named[f"shared.{layer}.h_pos"],
                    encoder=tuple(
                        (named[f"shared.{layer}.encoder.{i}.weight"], named[f"shared.{layer}.encoder.{i}.bias"])
                        for i in range(header.encoder_maps)
                    ),
                )
                for layer in header.layers
            },
            calibration=header.calibration
            and Calibration(
                header.calibration[0],
                named["calibration.center"],
                named["calibration.cases"],
                named.get("calibration.wording"),
                named.get("calibration.asking"),
            ),
        )

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "Edits":
        return replace(
            self,
            entries=list(self.entries),
            layers={layer: own.map(fn) for layer, own in self.layers.items()},
            shared={layer: shared.map(fn) for layer, shared in self.shared.items()},
            calibration=self.calibration and self.calibration.map(fn),
        )

    def _take(self, edits: list[int]) -> "Edits":
        """Copies of these edits, in this order, and of what they share."""
        return replace(
            self,
            entries=[self.entries[e] for e in edits],
            layers={layer: own.take(edits) for layer, own in self.layers.items()},
            shared={layer: shared.map(_copy) for layer, shared in self.shared.items()},
            calibration=self.calibration and self.calibration.map(_copy),
        )

    def _positions(self, ids: Iterable[str]) -> list[int]:
        position = {name: e for e, name in enumerate(self.ids)}
        wanted = list(ids)
        if unknown := [name for name in wanted if name not in position]:
            raise UnknownEditError(f"no edit has the id {listed(unknown)}; there are {len(self)}: {listed(self.ids)}")
        return [position[name] for name in wanted]

    def _owner(self, name: str, tensor: torch.Tensor) -> str:
        """For a message: whose row it is that is not finite."""
        room, layer, field = (*name.split(".", 2), "")[:3]
        if room != "layers":
            return ""
        row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(1).nonzero()[0])
        for entry in self.entries:
            row -= 1 if field in PER_EDIT else entry.neurons[int(layer)]
            if row < 0:
                return f", of edit {entry.id!r}"
        return ""


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"


def _cut(text: str, limit: int) -> str:
    """One printable line, for a table in a terminal."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _differences(a: Edits, b: Edits) -> list[str]:
    """What keeps two Edits from being merged: everything but their own groups must be equal."""
    found = [f"base {line}" for line in a.base.mismatches(b.base)]
    if not found and not a.base.same_probe(b.base):
        found.append(f"base probe: {a.base.probe} and {b.base.probe}")
    configs = [_leaves("config", part.config.to_json()) for part in (a, b)]
    found += [
        f"{key}: {value!r} and {configs[1][key]!r}" for key, value in configs[0].items() if configs[1][key] != value
    ]
    if set(a.layers) != set(b.layers):
        return [*found, f"layers: {sorted(a.layers)} and {sorted(b.layers)}"]
    ours, theirs = a.named_tensors(), b.named_tensors()
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs:
            found.append(f"{name}: only {'the second' if name in theirs else 'the first'} has it")
            continue
        one, other = ours[name], theirs[name]
        if _kind(one) != _kind(other):
            found.append(f"{name}: {_kind(one)} and {_kind(other)}")
        elif name.startswith("layers."):
            continue
        elif one.shape != other.shape:
            found.append(f"{name}: shapes {list(one.shape)} and {list(other.shape)}")
        elif not torch.equal(one, other):
            found.append(f"{name}: values up to {float((one - other).abs().max()):.3g} apart")
    return found


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, by the least and the greatest, which are nan where one is.

    Of 20,000 x 2,560 in float32 that takes 7 ms on one CPU core; `isfinite().all()`, which writes a mask, 280.
    """
    if tensor.numel() == 0:
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))
    return bool(ends.isfinite().all())


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {leaf: v for key, part in value.items() for leaf, v in _leaves(f"{name}.{key}", part).items()}
