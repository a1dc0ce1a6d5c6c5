"""What an editor learned, in one safetensors file: a large model's memory takes hours to build, seconds to load."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from .disentangle import Encoder, LayerFit
from .extract import LayerStates, TripletStates

FORMAT_VERSION = 1
_ENCODERS = ("enc_sem", "enc_tru")
_MATRICES = ("zeta", "w_zeta", "zeta_prime")


@dataclass
class Learned:
    """All that `Editor.build_memory`, `fit` and `calibrate` leave behind.

    triplets: prompt, target, and in the place of the picture its digest; cases: [M, d], for routing; prompts: of
    these M; questions: M times what is asked, or None.
    """

    states: TripletStates
    triplets: list[dict[str, Any]]
    cases: Tensor
    prompts: list[str]
    questions: list[str | None]
    fits: dict[int, LayerFit]


def write(path: Path, learned: Learned, header: dict[str, Any]) -> None:
    """Saves it with a header of plain JSON values, whole or not at all."""
    states, tensors = learned.states, {"cases": learned.cases, "states.cases": learned.states.cases}
    for i, layer in states.layers.items():
        tensors |= {f"states.{i}.{f.name}": getattr(layer, f.name) for f in fields(LayerStates)}
        tensors[f"states.{i}.ffn_mean"] = states.ffn_mean[i]
    measured = {}
    for i, fit in learned.fits.items():
        tensors |= {f"fit.{i}.{name}": getattr(fit, name) for name in _MATRICES}
        for name in _ENCODERS:
            for n, (weight, bias) in enumerate(getattr(fit, name)):
                tensors |= {f"fit.{i}.{name}.{n}.weight": weight, f"fit.{i}.{name}.{n}.bias": bias}
        measured[i] = {f.name: getattr(fit, f.name) for f in fields(LayerFit) if f.name not in _ENCODERS + _MATRICES}
    document = header | {
        "format_version": FORMAT_VERSION,
        "layers": list(states.layers),
        "kept": states.kept,
        "predictions": states.predictions,
        "triplets": learned.triplets,
        "prompts": learned.prompts,
        "questions": learned.questions,
        "fits": measured,
    }
    with replacing(path) as half:
        save_file(
            {name: t.detach().cpu().clone() for name, t in tensors.items()}, half, {"editor": json.dumps(document)}
        )


def read(path: Path) -> tuple[dict[str, Any], Learned]:
    """(header, what was learned); ValueError, naming the file, where it is damaged or of another format."""
    try:
        with safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {})["editor"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
        found = document["format_version"]
        if found == FORMAT_VERSION:
            return document, _learned(document, tensors)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as err:
        what = f"it has no {err}" if isinstance(err, KeyError) else err
        raise ValueError(f"{path} is not a saved editor, or is damaged: {what}") from err
    raise ValueError(f"{path} has format {found}, but this package reads format {FORMAT_VERSION}")


def _learned(document: dict[str, Any], tensors: dict[str, Tensor]) -> Learned:
    layers = {
        i: LayerStates(*(tensors[f"states.{i}.{f.name}"] for f in fields(LayerStates))) for i in document["layers"]
    }
    means = {i: tensors[f"states.{i}.ffn_mean"] for i in layers}
    states = TripletStates(document["kept"], document["predictions"], layers, tensors["states.cases"], means)
    fits = {int(i): _fit(int(i), measured, tensors) for i, measured in document["fits"].items()}
    texts = document["prompts"], document["questions"]
    return Learned(states, document["triplets"], tensors["cases"], *texts, fits)


def _fit(layer: int, measured: dict[str, Any], tensors: dict[str, Tensor]) -> LayerFit:
    def encoder(name: str) -> Encoder:
        maps: list[tuple[Tensor, Tensor]] = []
        while (start := f"fit.{layer}.{name}.{len(maps)}") + ".weight" in tensors:
            maps.append((tensors[f"{start}.weight"], tensors[f"{start}.bias"]))
        return tuple(maps)

    parts: dict[str, Any] = {name: encoder(name) for name in _ENCODERS}
    return LayerFit(**parts, **{name: tensors[f"fit.{layer}.{name}"] for name in _MATRICES}, **measured)
