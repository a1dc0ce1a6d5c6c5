"""What sits where on a patched model."""

from dataclasses import dataclass

from torch import Tensor, nn

from .backends import resolve
from .records import records


@dataclass(frozen=True)
class SiteStatus:
    """One site of one patch: sizes in rows (of storage), tensors in bytes, the int8 copy of a memory among them.

    scored: how many of a memory's items the last search of such a copy scored exactly, for the query with the most;
    nearly all of them: they lie too close together for int8. None: there was no such search.
    """

    name: str
    module: str
    kind: str
    enabled: bool
    edits: int
    rows: int
    dtype: str
    device: str
    bytes: int
    backend: str
    mode: str
    scored: int | None = None


class Status(list[SiteStatus]):
    """What sits where on a model; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no edits on this model"
        head: list[object] = ["name", "module", "kind", "on", "edits", "rows", "dtype", "device", "bytes"]
        rows: list[list[object]] = [
            [s.name, s.module, s.kind, "yes" if s.enabled else "no", s.edits, s.rows, s.dtype, s.device, s.bytes]
            for s in self
        ]
        if any(s.scored is not None for s in self):
            head.append("scored")
            for row, s in zip(rows, self, strict=True):
                row.append("" if s.scored is None else s.scored)
        cells = [tuple(map(str, r)) for r in (head, *rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells)


def _backend(chosen: str, tensor: Tensor) -> str:
    return resolve(chosen, tensor.device, tensor.dtype) if chosen == "auto" else chosen


def status(model: nn.Module) -> Status:
    """What sits where on `model`: one SiteStatus per site and patch, in layer order; empty for a clean model."""
    out = Status()
    names = {module: name for name, module in model.named_modules()}
    for holder, record in records(model):
        prefix = f"{names[holder]}." if names[holder] else ""
        for layer in record.layers:
            for kind, module, site, main in (
                ("router", layer.router, layer.sites.attention, layer.router and layer.router.keys),
                ("shift", layer.shift, layer.sites.attention, layer.shift and layer.shift.memory.sem),
                ("neurons", layer.neurons, layer.sites.ffn_output, layer.neurons and layer.neurons.keys),
            ):
                if module is None or main is None:
                    continue
                index = module.memory.kept.index if kind == "shift" else None
                out.append(
                    SiteStatus(
                        name=record.name,
                        module=prefix + site,
                        kind=kind,
                        enabled=record.runtime.enabled,
                        edits=len(record.edits),
                        rows=len(main),
                        dtype=str(main.dtype).removeprefix("torch."),
                        device=str(main.device),
                        bytes=sum(t.numel() * t.element_size() for t in module.buffers())
                        + (0 if index is None else index.bytes),
                        backend=_backend(module.backend, main),
                        mode=record.mode,
                        scored=None if index is None or not len(index.reranked) else int(index.reranked.max()),
                    )
                )
    return out


def active(model: nn.Module) -> list[str]:
    """The names of the patches on `model` that are switched on."""
    return sorted({record.name for _, record in records(model) if record.runtime.enabled})
