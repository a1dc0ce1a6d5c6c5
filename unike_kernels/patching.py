"""patch and unpatch: edits on a model, in place, by child modules and forward hooks; plan, check, then commit."""

from collections.abc import Sequence

from torch import nn

from .attaching import attach, detach
from .edits import Edits
from .handle import PatchHandle
from .keeping import to_keep
from .models import Decoder
from .planning import Capacities, fingerprint, plan
from .records import records
from .statuses import SiteStatus, Status, status

__all__ = ["PatchHandle", "SiteStatus", "Status", "fingerprint", "patch", "status", "unpatch"]


def patch(
    model: nn.Module,
    edits: Edits,
    *,
    name: str = "default",
    backend: str = "auto",
    mode: str = "attach",
    routing: str = "edits",
    layers: Sequence[int] | None = None,
    sites: Decoder | None = None,
    max_groups: int | None = None,
    max_neurons: int | None = None,
    max_items: int | None = None,
) -> PatchHandle:
    """Puts `edits` on `model`, in place, on this instance only; the model answers with the edits from the next call on.

    model: any module that holds a known decoder (`models.find_decoder`), or one described by `sites`.
    name: of this patch. Patches of different names stack, in the order in which they were made: each sees what those
        before it did at the same site, and all of them what happened in the layers below.
    backend: "auto" or one of `backends.available()`. mode: "attach" (child modules and forward hooks), or
        "fuse", for inference with always-on edits and few tokens: one operator reads the FFN's weights and the neurons,
        for up to 64 rows; everything else as in "attach". It needs plain nn.Linear and refuses others by name.
    routing: "edits" (what the edits say), "always" (neurons act on every token: the paper) or "routed".
    layers: decoder layers to edit, some of the edits' own (default: all of those).
    max_groups, max_neurons (per layer), max_items: capacities, so that `handle.swap` can take larger edits later.

    Returns a PatchHandle; `with patch(model, edits):` undoes it at the end, also on an exception. Every check comes
    before the first change: ValueError (names, sizes, layers, another architecture), UnsupportedModelError. One pass
    runs on a patched model at a time. A model compiled before (or after) follows patch, swap, `disabled` and unpatch;
    after an adapter was merged or switched, `handle.refresh()`.
    """
    with to_keep():
        decoder, record = plan(
            model,
            edits,
            name=name,
            backend=backend,
            mode=mode,
            routing=routing,
            layers=layers,
            sites=sites,
            capacities=Capacities(max_groups, max_neurons, max_items),
        )
    attach(model, decoder, record)
    return PatchHandle(model, record)


def unpatch(model: nn.Module) -> None:
    """Removes every patch from `model`, which is then bit for bit the base; does nothing on a clean model."""
    for holder, record in list(records(model)):
        detach(model, holder, record)
