"""Where the sites of a model are: one small function per decoder family, found by structure, so wrappers do not matter.

A site is one place that an edit acts on: the FFN or the self-attention of one decoder layer. BLIP-2, MiniGPT-4, LAVIS
and LLaVA differ in what surrounds their language model, not in the layers of it, so the families here are decoder
layers: `opt` (fc1 and fc2 on the layer itself) and `llama` (gate_proj, up_proj, down_proj in `mlp`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

ACT_OF = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "Identity": "identity",
    "relu": "relu",  # torch.nn.functional's
    "silu": "silu",
    "gelu": "gelu",
}
KNOWN_NORMS = ("q_norm", "k_norm")  # children of a self-attention: of q and k, before both are rotated


class UnsupportedModelError(ValueError):
    """No decoder with known layers in this model; lists the known families and how to name sites by hand."""


@dataclass(frozen=True)
class LayerSites:
    """The two sites of one decoder layer, as dotted module names below the model (or below the layer, in a family).

    The FFN adds at `ffn_output`'s output what it computes from `ffn_input`'s input; for a gated FFN both are `mlp`.
    """

    attention: str
    ffn_input: str
    ffn_output: str
    gated: bool
    act: str
    q_proj: str
    k_proj: str
    v_proj: str
    out_proj: str
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    q_norm: str | None = None
    k_norm: str | None = None
    softcap: float | None = None

    def module_names(self) -> list[str]:
        """The names of all modules, those that the layer does not have left out."""
        return [name for field in _MODULE_FIELDS if (name := getattr(self, field)) is not None]

    def below(self, prefix: str) -> "LayerSites":
        """The same sites with every module name below `prefix`."""
        return self._renamed(lambda name: f"{prefix}.{name}")

    def relative_to(self, prefix: str) -> "LayerSites":
        """The inverse of `below`; ValueError where a name does not start with `prefix`."""
        outside = [name for name in self.module_names() if not name.startswith(f"{prefix}.")]
        if outside:
            raise ValueError(f"sites must lie inside their decoder {prefix!r}, but got {', '.join(outside)}")
        return self._renamed(lambda name: name[len(prefix) + 1 :])

    def _renamed(self, rename: Callable[[str], str]) -> "LayerSites":
        names: dict[str, Any] = {field: getattr(self, field) for field in _MODULE_FIELDS}
        moved: dict[str, Any] = {field: name and rename(name) for field, name in names.items()}
        return replace(self, **moved)


_MODULE_FIELDS = ("attention", "ffn_input", "ffn_output", "q_proj", "k_proj", "v_proj", "out_proj", "q_norm", "k_norm")


@dataclass(frozen=True)
class Decoder:
    """A language model's decoder: the module that owns `layers`, and the sites of every layer in order."""

    family: str
    name: str
    layers: tuple[LayerSites, ...]

    def layer_name(self, index: int) -> str:
        """Dotted name of one decoder layer."""
        return f"{self.name}.layers.{index}" if self.name else f"layers.{index}"

    def relative(self) -> "Decoder":
        """The same decoder with names below itself instead of below the model."""
        if not self.name:
            return self
        return Decoder(self.family, "", tuple(layer.relative_to(self.name) for layer in self.layers))

    def default_layers(self) -> tuple[int, ...]:
        """The last four decoder layers (the paper's choice), or all of a shallower model."""
        n = len(self.layers)
        return tuple(range(max(0, n - 4), n))


FAMILIES: dict[str, Callable[[nn.Module], LayerSites | None]] = {}


def register_family(name: str) -> Callable[[Callable[[nn.Module], LayerSites | None]], Callable]:
    """Registers `layer -> LayerSites` (names below the layer), or None where the layer is of another family."""

    def add(describe: Callable[[nn.Module], LayerSites | None]) -> Callable[[nn.Module], LayerSites | None]:
        FAMILIES[name] = describe
        return describe

    return add


@register_family("opt")
def opt(layer: nn.Module) -> LayerSites | None:
    """OPT's decoder layer (transformers' and LAVIS's): FFN without a gate, flattened to [B * S, d] before fc1."""
    if not _has(layer, "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2", "activation_fn"):
        return None
    return LayerSites(
        attention="self_attn",
        ffn_input="fc1",
        ffn_output="fc2",
        gated=False,
        act=_activation(layer.activation_fn),
        hidden_size=layer.fc1.in_features,
        ffn_size=layer.fc1.out_features,
        **_attention(layer.self_attn, "self_attn", "out_proj"),
    )


@register_family("llama")
def llama(layer: nn.Module) -> LayerSites | None:
    """LLaMA-style gated decoder layer: LLaMA, Vicuna, Mistral, Qwen2 and Qwen3, alone or inside a multimodal model."""
    if not _has(layer, "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        return None
    return LayerSites(
        attention="self_attn",
        ffn_input="mlp",
        ffn_output="mlp",
        gated=True,
        act=_activation(layer.mlp.act_fn),
        hidden_size=layer.mlp.gate_proj.in_features,
        ffn_size=layer.mlp.gate_proj.out_features,
        **_attention(layer.self_attn, "self_attn", "o_proj"),
    )


def find_decoder(model: nn.Module) -> Decoder:
    """The one decoder in `model` whose layers are of a known family, wherever wrappers put it.

    Raises UnsupportedModelError when there is none, or more than one.
    """
    found = []
    strange = ""
    for name, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            continue
        for family, describe in FAMILIES.items():
            try:
                sites = [describe(layer) for layer in layers]
            except UnsupportedModelError as error:  # of a known structure, but perhaps not the language model
                strange = f" ({name}: {error})"
                continue
            if all(sites):
                prefix = f"{name}.layers" if name else "layers"
                placed = tuple(s.below(f"{prefix}.{i}") for i, s in enumerate(sites) if s is not None)
                found.append(Decoder(family, name, placed))
    if len(found) == 1:
        return found[0]
    what = "no decoder of a known family" if not found else f"several decoders ({', '.join(d.name for d in found)})"
    raise UnsupportedModelError(
        f"{type(model).__name__} has {what}{strange}. Known families: {', '.join(sorted(FAMILIES))}. "
        "Name the sites by hand: patch(model, edits, sites=unike_kernels.models.Decoder(family, name, layers)), "
        "or describe the layer once with unike_kernels.models.register_family."
    )


def get_module(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule(name)`, with an error that names the model's class."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {name!r}") from None


def learned_positions(model: nn.Module, decoder: Decoder) -> int | None:
    """How many positions the decoder learned to tell apart (OPT); None where it computes them, as rotary ones."""
    holder = dict(model.named_modules()).get(decoder.name)  # a decoder named by hand may have any name
    for name, child in holder.named_children() if holder is not None else ():
        if isinstance(child, nn.Embedding) and "position" in name:
            return child.num_embeddings - int(getattr(child, "offset", 0))
    return None


def base_layer(module: nn.Module) -> nn.Module:
    """What an adapter (peft's layers, however many) wraps; the module itself where nothing does."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def probe_weights(model: nn.Module, decoder: Decoder, layers: Iterable[int], samples: int = 8) -> tuple[float, ...]:
    """A few sampled FFN input weights of the edited layers, to tell one base checkpoint from another.

    Weights that are quantised, offloaded or of a tensor subclass give no samples. Values are rounded to 3 significant
    digits; compare them with `same_weights`.
    """
    out: list[float] = []
    for i in layers:
        site = get_module(model, decoder.layers[i].ffn_input)
        weight = next((p for p in site.parameters() if p.dim() == 2 and _readable(p)), None)
        if weight is None:
            continue
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, samples, dtype=torch.float64).long()
        out += [float(f"{v:.2e}") for v in flat[at.to(flat.device)].double().tolist()]
    return tuple(out)


def same_weights(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of one checkpoint, in whatever precision; yes where either could not sample all layers."""
    if len(probe) != len(other):
        return True
    # 1 % covers bfloat16 (0.4 %) and the rounding of both probes (0.5 % together); float16 loses the smallest numbers.
    return all(math.isclose(a, b, rel_tol=0.01, abs_tol=1e-6) for a, b in zip(probe, other, strict=True))


def _readable(p: torch.Tensor) -> bool:
    plain = type(p) in (torch.Tensor, nn.Parameter)
    return plain and p.is_floating_point() and p.dtype.itemsize >= 2 and p.device.type != "meta"


def _has(module: nn.Module, *names: str) -> bool:
    for name in names:
        part: object = module
        for step in name.split("."):
            part = getattr(part, step, None)
        if part is None:
            return False
    return True


def _activation(module: object) -> str:
    """The name, as the operators know it, of an activation module or function."""
    name = getattr(module, "__name__", type(module).__name__)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        name = "GELUTanh"
    if name not in ACT_OF:
        raise UnsupportedModelError(f"unknown activation {name!r}; known: {', '.join(sorted(ACT_OF))}")
    return ACT_OF[name]


def _attention(attn: nn.Module, name: str, out_proj: str) -> dict:
    """The attention half of LayerSites; head counts come from the projections' sizes, never from a config."""
    missing = [proj for proj in ("k_proj", "v_proj") if getattr(attn, proj, None) is None]
    if missing:
        raise UnsupportedModelError(f"{type(attn).__name__} has no {' and no '.join(missing)} of its own")
    # What a norm of another name does to q, k, v or the heads, and when, is not known, so items would be read wrongly.
    norms = [n for n, m in attn.named_children() if "norm" in n + type(m).__name__.lower() and n not in KNOWN_NORMS]
    if norms:
        raise UnsupportedModelError(f"{type(attn).__name__} has norms besides q_norm and k_norm: {', '.join(norms)}")
    clip = getattr(getattr(attn, "config", None), "clip_qkv", None)
    if clip is not None:  # OLMo: in place, and the memory's keys and values would have to be clipped with the layer's
        raise UnsupportedModelError(f"{type(attn).__name__} clips its queries, keys and values (clip_qkv {clip})")
    head_dim = int(attn.head_dim)
    return {
        "q_proj": f"{name}.q_proj",
        "k_proj": f"{name}.k_proj",
        "v_proj": f"{name}.v_proj",
        "out_proj": f"{name}.{out_proj}",
        "heads": attn.q_proj.out_features // head_dim,
        "kv_heads": attn.k_proj.out_features // head_dim,
        "head_dim": head_dim,
        "scaling": float(getattr(attn, "scaling", head_dim**-0.5)),
        "q_norm": f"{name}.q_norm" if getattr(attn, "q_norm", None) is not None else None,
        "k_norm": f"{name}.k_norm" if getattr(attn, "k_norm", None) is not None else None,
        "softcap": getattr(attn, "attn_logit_softcapping", None),
    }
