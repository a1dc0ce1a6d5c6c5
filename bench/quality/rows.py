"""The rows of the ablation: what each switches on, and the controls that say what a gain comes from."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unike_kernels import reference
from unike_kernels.config import NeuronConfig, UnikeConfig
from unike_kernels.editing.disentangle import LayerFit
from unike_kernels.editing.editor import Editor
from unike_kernels.edits import Edits
from unike_kernels.models import get_module
from unike_kernels.patching import PatchHandle

# Of keys and values of edits that are always on, on the emoji models: searched as every baseline's rate was
# (`python -m bench.quality.run --rows measure --points "both rates"`). Routed rows have the library's own.
RATE = 3e-3
FIXED_ALPHA = 0.5  # of the rows without adaptive alpha; the prototype's middle setting


@dataclass(frozen=True)
class Row:
    """One line of the table; alpha: None is adaptive, "mean" the mean adaptive alpha on the edits' own prompts."""

    name: str
    neurons: bool = True
    shift: bool = True
    alpha: float | Literal["mean"] | None = None
    zeta: Literal["truthful", "semantic", "random", "none"] = "truthful"
    memory: Literal["triplets", "shuffled", "negative", "zero"] = "triplets"
    own_item: bool = True
    items: int | None = None  # retrieved at most; None: the base's
    routed: bool = False
    control: bool = False

    def config(self, base: UnikeConfig, mean_alpha: float | None) -> UnikeConfig:
        """The configuration of this row; `mean_alpha` is what "mean" stands for."""
        neurons = replace(base.neurons, enabled=self.neurons)
        if self.zeta == "none":
            neurons = replace(neurons, beta=0.0)
        if self.routed:
            neurons = replace(neurons, lr_keys=NeuronConfig().lr_keys, lr_values=NeuronConfig().lr_values)
        alpha = mean_alpha if self.alpha == "mean" else self.alpha
        k = base.shift.k if self.items is None else self.items
        return replace(
            base,
            shift=replace(base.shift, enabled=self.shift, alpha=alpha, own_item=self.own_item, k=k),
            neurons=neurons,
            routing=replace(base.routing, mode="always"),
        )


ROWS = (
    Row("intrinsic only", shift=False, zeta="none"),
    Row("latent-IKE only", neurons=False, alpha=FIXED_ALPHA, zeta="none"),
    Row("intrinsic + latent-IKE", alpha=FIXED_ALPHA, zeta="none"),
    Row("UniKE"),
    Row("intrinsic only, routed", shift=False, zeta="none", routed=True),
    Row("UniKE, routed", routed=True),
)

CONTROLS = (
    Row("UniKE, h_know = 0", memory="zero", control=True),
    Row("UniKE, shuffled memory", memory="shuffled", control=True),
    Row("UniKE, h_neg memory", memory="negative", control=True),
    Row("UniKE, random zeta", zeta="random", control=True),
    Row("UniKE, no zeta", zeta="none", control=True),
    Row("UniKE, alpha fixed at its mean", alpha="mean", control=True),
    Row("UniKE, own item left out", own_item=False, control=True),
    Row("latent-IKE only, adaptive alpha", neurons=False, zeta="none", control=True),
)

ITEMS, ALPHAS = (1, 2, 5, 10, 20, 40), (0.1, 0.25, 0.5, 0.75, 1.0)  # the points of Figures 4a and 4b
FIGURES = {
    "4a": tuple(Row(f"intrinsic + latent-IKE, items {n}", alpha=FIXED_ALPHA, zeta="none", items=n) for n in ITEMS),
    "4b": (*(Row(f"UniKE, alpha {a:g}", alpha=a) for a in ALPHAS), ROWS[3]),
    "4c": (CONTROLS[4], CONTROLS[3], Row("UniKE, semantic zeta", zeta="semantic", control=True), ROWS[3]),
}


class RowEditor(Editor):
    """An editor whose memory or zeta can be a control's; everything else is the library's."""

    row: Row = Row("UniKE")

    def prepare(self, row: Row, like: Editor, mean_alpha: float | None = None) -> "RowEditor":
        """Takes over `like`'s memory, encoders and calibration, with the row's changes."""
        self.row = row
        self.config = row.config(like.config, mean_alpha)
        self.triplets, self.states = like.triplets, like.states
        self.cases, self.prompts, self.questions = like.cases, like.prompts, like.questions
        self.fits = dict(like.fits)
        generator = torch.Generator().manual_seed(1)
        if self.states is not None and row.memory in ("shuffled", "negative"):
            order = torch.randperm(len(self.states.kept), generator=generator)
            layers = {
                i: replace(s, h_pos=s.h_neg if row.memory == "negative" else s.h_pos[order])
                for i, s in self.states.layers.items()
            }
            self.states = replace(self.states, layers=layers)
        if row.zeta == "random":
            for i, fit in like.fits.items():
                noise = torch.randn(fit.zeta_prime.shape, generator=generator)
                self.fits[i] = replace(fit, zeta_prime=noise / noise.norm() * fit.zeta_prime.norm())
        if row.zeta == "semantic":
            self.fits = {i: replace(fit, zeta_prime=self.semantic(i, fit)) for i, fit in like.fits.items()}
        return self

    def semantic(self, layer: int, fit: LayerFit) -> Tensor:
        """[d] zeta' of the way from wrong to right answers in Enc_sem's space, as long as the true one.

        W_zeta stays: a decoder of Enc_sem's own space would undo the encoder, as the true one's does, and both ways
        lead to about the difference of the mean states.
        """
        states, activation = self._need_states().layers[layer], self.config.encoders.activation
        encoded = (
            reference.encode(self.injected(layer, h), fit.enc_sem, activation) for h in (states.h_pos, states.h_neg)
        )
        found = fit.w_zeta @ reference.zeta(*encoded)
        return found / found.norm() * fit.zeta_prime.norm()

    def own_items(self, samples: list[Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """The edits' own items; a control's memory has the same fault in them as in the triplets' items."""
        own = super().own_items(samples)
        if self.row.memory == "shuffled":  # a batch of one has nobody to swap with: take a triplet's state
            states = self._need_states()
            return {i: (sem, states.layers[i].h_pos[: len(sem)]) for i, (sem, _) in own.items()}
        if self.row.memory == "negative":
            asked = [replace(s, target=None) for s in samples]
            wrong = [
                replace(s, target=a or s.target) for s, a in zip(samples, self.collator.generate(asked), strict=True)
            ]
            return super().own_items(wrong)
        return own

    def training_patch(self, edits: Edits, max_neurons: int) -> PatchHandle:
        """The patch that carries the edits while they train, with the row's control applied."""
        return self.controlled(super().training_patch(edits, max_neurons))

    def controlled(self, handle: PatchHandle) -> PatchHandle:
        """Makes h_know zero for the row that asks for it: values whose output projection is exactly its bias undone."""
        if self.row.memory == "zero":
            for layer in handle.record.layers:
                if layer.shift is None:
                    continue
                out = get_module(self.model, self.decoder.layers[layer.index].out_proj)
                if out.bias is None:
                    layer.shift.memory.values.zero_()
                    continue
                heads = torch.linalg.solve(out.weight.double(), -out.bias.double())
                values = heads.view(layer.sites.kv_heads, layer.sites.head_dim)
                layer.shift.memory.values.copy_(
                    values.to(layer.shift.memory.values).expand_as(layer.shift.memory.values)
                )
        return handle


def default_config() -> UnikeConfig:
    """The library's defaults, but for RATE: what the reported rows start from."""
    return UnikeConfig(neurons=NeuronConfig(lr_keys=RATE, lr_values=RATE))
