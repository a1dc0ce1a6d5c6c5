"""What a patch leaves on a model: one PatchRecord, kept on the decoder itself, so that every way to it finds it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .config import UnikeConfig
from .edits import Edits
from .forwards import Handle
from .fused import FusedFfn
from .hooks import Runtime
from .models import Decoder, LayerSites
from .modules import KnowledgeShift
from .neurons import ExtraNeurons
from .routing import Router

RECORDS = "_unike_patches"  # {name: PatchRecord} in the __dict__ of a patched decoder
CONTAINER = "unike"  # the child of a site that holds the edits' modules: <site>.unike.<name>.*


@dataclass
class LayerPatch:
    """What one patch put at one decoder layer; names in `sites` are below the decoder."""

    index: int
    sites: LayerSites
    neurons: ExtraNeurons | None
    shift: KnowledgeShift | None
    router: Router | None


@dataclass
class PatchRecord:
    """All that one patch put on a model.

    But for `fused`, it holds no module of the model itself; it is copied with its model, never alone.
    """

    name: str
    edits: Edits
    config: UnikeConfig  # the edits' own, with the routing that was asked for
    routing: str  # as given to `patch`
    backend: str
    decoder: Decoder  # names below the decoder
    layers: list[LayerPatch]
    runtime: Runtime
    hooks: list[Handle] = field(default_factory=list)
    mode: str = "attach"
    fused: list[FusedFfn] = field(default_factory=list)  # of mode "fuse"
    warned: bool = False  # that saving the model does not save the edits


def records(model: nn.Module) -> Iterator[tuple[nn.Module, PatchRecord]]:
    """Every (decoder, record) in `model`, in the order in which the patches were made."""
    for module in model.modules():
        for record in list(module.__dict__.get(RECORDS, {}).values()):
            yield module, record
