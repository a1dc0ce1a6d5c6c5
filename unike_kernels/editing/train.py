"""Training the extra neurons of a batch of edits: keys where the model goes wrong, values that correct it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import NeuronConfig
from ..edits import LayerEdits
from ..evaluation.scoring import name_cases
from ..models import Decoder, get_module
from ..patching import PatchHandle
from .inputs import Batch
from .prefix import Prefix, head, recorded, run_tail


@dataclass
class TrainedGroups:
    """The new neurons of E edits by layer (CSR by edit), and how each edit ended."""

    neurons: dict[int, dict[str, Tensor]]  # layer -> {"keys", "key_bias", "values"[, "up", "up_bias"]}, [E * ne, ...]
    zeta: dict[int, Tensor]  # layer -> [E, d]
    loss: list[float]
    success: list[bool]
    steps: list[int]


class GroupTrainer:
    """Trains one group per edit and layer for the E edits of `batch`, on a model that carries `handle`'s patch.

    The patch's last E groups are the new ones; the groups before them are kept as they are. Independent edits: each
    row sees its own group only. Otherwise (sequential, E = 1) every group acts.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        handle: PatchHandle,
        config: NeuronConfig,
        ffn_mean: dict[int, Tensor],
        zeta: dict[int, Tensor],
        *,
        independent: bool,
        maps: dict[int, Tensor] | None = None,
        lr_maps: float = 0.0,
    ) -> None:
        """ffn_mean, zeta: [d] by layer: the mean FFN input that keys are centred on, and zeta'.

        maps: W_zeta [d, d] by layer, learned along with the edits in place, `zeta` then being what they map.
        """
        self.model, self.decoder, self.handle, self.config = model, decoder, handle, config
        self.ffn_mean, self.independent = ffn_mean, independent
        self.head = head(model, decoder)
        self.layers = {layer.index: layer for layer in handle.record.layers}
        self.zeta, self.maps, self.lr_maps = zeta, maps, lr_maps
        self.generator = torch.Generator().manual_seed(config.seed)

    def train(self, batch: Batch, prefix: Prefix, existing: dict[int, LayerEdits]) -> TrainedGroups:
        """Trains until every target token is top-1 by the margin, or for `steps`; an edit that is done stays."""
        edits = batch.shape[0]
        old = len(self.handle.edits) - edits
        selected = None
        if self.independent:
            selected = (torch.arange(edits, device=prefix.hidden.device) + old)[:, None]
        inputs = self._ffn_inputs(batch, prefix, selected)
        leaves = {i: self._start(inputs[i], batch, i) for i in self.layers}
        zeta = self._zeta(edits, prefix.hidden)
        groups = [
            {"params": [t for name, t in named(leaves) if "values" in name], "lr": self.config.lr_values},
            {"params": [t for name, t in named(leaves) if "values" not in name], "lr": self.config.lr_keys},
        ]
        if self.config.lr_zeta > 0:
            groups.append({"params": [z.requires_grad_() for z in zeta.values()], "lr": self.config.lr_zeta})
        trained = [p for group in groups for p in group["params"]]
        if self.maps is not None:
            groups.append({"params": list(self.maps.values()), "lr": self.lr_maps})
        optimizer = torch.optim.Adam(groups)
        done = torch.zeros(edits, dtype=torch.bool, device=prefix.hidden.device)
        steps = torch.zeros(edits, dtype=torch.long)
        for step in range(self.config.steps + 1):
            if self.maps is not None:
                zeta = self._zeta(edits, prefix.hidden)
            self._install(leaves, zeta, existing)
            loss, margin = self._forward(batch, prefix, selected)
            done = done | (margin >= self.config.margin)
            if bool(done.all()) or step == self.config.steps:
                break
            optimizer.zero_grad()
            loss[~done].sum().backward()
            before = [p.detach().clone() for p in trained]
            optimizer.step()
            for p, kept in zip(trained, before, strict=True):
                finished = done.repeat_interleave(len(p) // edits)
                p.data[finished] = kept[finished]
            steps += (~done).long().cpu()
        return TrainedGroups(
            {i: {k: t.detach().clone() for k, t in layer.items()} for i, layer in leaves.items()},
            {i: z.detach().clone() for i, z in zeta.items()},
            [float(x) for x in loss.detach()],
            [bool(m > 0) for m in margin.detach()],
            steps.tolist(),
        )

    def _zeta(self, edits: int, like: Tensor) -> dict[int, Tensor]:
        """zeta' [E, d] by layer: given, or mapped from zeta by the W_zeta that are being learned."""
        if self.maps is None:
            return {i: z.to(like).expand(edits, -1).clone() for i, z in self.zeta.items()}
        return {i: (self.maps[i] @ z.to(like)).expand(edits, -1) for i, z in self.zeta.items()}

    @torch.no_grad()
    def _ffn_inputs(self, batch: Batch, prefix: Prefix, selected: Tensor | None) -> dict[int, Tensor]:
        """[B, S, d] what enters each edited FFN, the shift active, the new groups (of zeros) without effect."""
        sites = {i: get_module(self.model, layer.sites.ffn_input) for i, layer in self.layers.items()}
        name_cases(self.handle, batch, selected)
        with recorded(sites, "input") as kept:
            run_tail(self.model, self.decoder, prefix)
        return {i: x.reshape(*batch.shape, -1) for i, x in kept.items()}

    def _start(self, x: Tensor, batch: Batch, layer: int) -> dict[str, Tensor]:
        """Keys from the FFN inputs that predict the target tokens, values of zero, for the E edits: [E * ne, ...].

        With x0 such an input, m the mean input, and s the share of (x - m)'s projection on (x0 - m), a neuron's
        pre-activation is (s - theta) / (1 - theta): 1 at x0 itself, 0 where the share falls to theta.
        """
        theta, ne = self.config.key_threshold, self.config.per_layer
        mean = self.ffn_mean[layer].to(x) if self.config.center_keys else torch.zeros_like(x[0, 0])
        rows, gated = [], self.layers[layer].sites.gated
        for states, mask in zip(x, batch.target_mask, strict=True):
            predicting = states[:-1][mask[1:]]  # [L, d] the states whose next token is a target token
            rows.append(predicting[torch.arange(ne, device=x.device) % len(predicting)])
        direction = torch.cat(rows) - mean  # [E * ne, d]
        size = direction.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        noise = torch.randn(direction.shape, generator=self.generator).to(x) / direction.shape[1] ** 0.5
        unit = direction / size + self.config.key_noise * noise
        keys = unit / size / (1 - theta)
        out = {"keys": keys, "key_bias": -theta / (1 - theta) - keys @ mean, "values": torch.zeros_like(keys)}
        if gated:  # up reads the same projection, so that silu(gate) * up grows with it
            up = unit / size
            out |= {"up": up, "up_bias": -(up @ mean)}
        return {name: t.detach().clone().requires_grad_() for name, t in out.items()}

    def _install(
        self, leaves: dict[int, dict[str, Tensor]], zeta: dict[int, Tensor], old: dict[int, LayerEdits]
    ) -> None:
        """Puts the tensors being trained into the patch's modules, behind the groups that are kept."""
        for i, layer in self.layers.items():
            module = layer.neurons
            assert module is not None  # the trainer's patch always has room for neurons
            for name, leaf in leaves[i].items():
                kept = getattr(old[i], name).to(leaf) if i in old else leaf[:0]
                setattr(module, name, torch.cat([kept, leaf]))
            kept = old[i].zeta.to(zeta[i]) if i in old else zeta[i][:0]
            module.zeta = torch.cat([kept, zeta[i]])

    def _forward(self, batch: Batch, prefix: Prefix, selected: Tensor | None) -> tuple[Tensor, Tensor]:
        """([E] mean negative log-likelihood of the target, [E] smallest logit margin over the target tokens)."""
        name_cases(self.handle, batch, selected)
        hidden = run_tail(self.model, self.decoder, prefix)
        at = batch.target_mask[:, 1:]  # [B, S - 1]
        logits = self.head(hidden[:, :-1][at]).float()  # [targets, V]
        wanted = batch.inputs["input_ids"][:, 1:][at]
        edit = at.nonzero()[:, 0]  # which edit each target token belongs to
        nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
        count = torch.bincount(edit, minlength=len(at))
        loss = torch.zeros(len(at), device=nll.device).index_add(0, edit, nll) / count
        picked = logits.detach().gather(1, wanted[:, None])
        others = logits.detach().scatter(1, wanted[:, None], -torch.inf).amax(dim=1)
        margin = torch.full((len(at),), torch.inf, device=nll.device)
        margin = margin.scatter_reduce(0, edit, picked[:, 0] - others, "amin")
        return loss, margin


def named(leaves: dict[int, dict[str, Tensor]]) -> Sequence[tuple[str, Tensor]]:
    """All trained tensors with their names."""
    return [(name, t) for layer in leaves.values() for name, t in layer.items()]
