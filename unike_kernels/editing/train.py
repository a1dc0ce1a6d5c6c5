"""Training the extra neurons of a batch of edits: keys where the model goes wrong, values that correct it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import NeuronConfig
from ..models import Decoder, get_module
from ..neurons import ExtraNeurons
from ..patching import PatchHandle
from .inputs import Batch, Collator, Sample
from .prefix import Prefix, cases_named, logits_step, recorded, run_prefix, run_tail
from .sparing import batch_axes, narrowed, output_of, replayed, rows_only

Rows = dict[str, Tensor]  # "keys", "key_bias", "values" and, where the FFN is gated, "up", "up_bias": [E * ne, ...]


@dataclass
class TrainedGroups:
    """The new neurons of E edits by layer, those of one edit side by side, and how each edit ended."""

    neurons: dict[int, Rows]
    zeta: dict[int, Tensor]  # layer -> [E, d]
    loss: list[float]
    success: list[bool]
    steps: list[int]


@dataclass
class _Pass:
    """The edits still trained: which of the E they are [b], their inputs, and the states below the edited layers."""

    rows: Tensor
    groups: Tensor  # [b] which of the patch's groups
    batch: Batch
    prefix: Prefix
    attended: Any = None  # what the first edited layer's self-attention gives in every step, no edit being below it
    axes: list[int | None] | None = None  # where its states hold the rows, once that was looked for
    looked: bool = False

    def states(self) -> Any:
        """All that the tail is run on, as a tree."""
        return self.prefix.hidden, self.prefix.calls, self.attended


class GroupTrainer:
    """Trains one group per edit and layer for E edits together, on a model that carries `handle`'s patch.

    The patch's last E groups are the new ones, still empty, with room for their neurons; the groups before them are
    kept as they are. Independent edits: each case sees its own group only. Otherwise (sequential, E = 1) all act.
    What is trained is float32 whatever the model computes in; the model reads it rounded, as it will once patched.
    """

    def __init__(
        self,
        collator: Collator,
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

        maps: W_zeta [d, d] by layer, learned along in place at the rate lr_maps; `zeta` is then what they map to zeta'.
        """
        self.collator, self.model, self.decoder = collator, collator.model, decoder
        self.handle, self.config, self.independent = handle, config, independent
        self.ffn_mean, self.zeta, self.maps, self.lr_maps = ffn_mean, zeta, maps, lr_maps
        self.logits_step = logits_step(collator.model, decoder)
        self.modules: dict[int, ExtraNeurons] = {
            layer.index: layer.neurons for layer in handle.record.layers if layer.neurons is not None
        }

    @torch.enable_grad()
    def train(self, samples: Sequence[Sample]) -> TrainedGroups:
        """Trains every edit until its target tokens are top-1 by the margin, or for `steps`; a finished one stays.

        samples: the E edits, all with a picture or all without.
        """
        edits, device = len(samples), self.collator.device
        kept = {i: self._make_room(module, edits) for i, module in self.modules.items()}
        work = self._pass(samples, torch.arange(edits, device=device))
        leaves = self._start(work.batch, self._ffn_inputs(work))
        zeta = self._zeta(edits)
        optimizer, owned = self._optimizer(leaves, zeta)
        loss, margin = (torch.zeros(edits, device=device, dtype=torch.float32) for _ in range(2))
        steps, done = torch.zeros_like(work.rows), torch.zeros_like(work.rows, dtype=torch.bool)
        for step in range(self.config.steps + 1):
            if self.maps is not None:
                zeta = self._zeta(edits)
            self._install(leaves, zeta, kept)
            now, found = self._forward(work)
            loss[work.rows], margin[work.rows] = now.detach().to(loss), found.to(margin)
            done |= margin >= self.config.margin
            left = work.rows[~done[work.rows]]
            if step == self.config.steps or len(left) == 0:
                break
            optimizer.zero_grad()
            now[~done[work.rows]].sum().backward()
            self._step(optimizer, owned, done)
            steps[left] += 1
            work = self._left(samples, work, left)
        return TrainedGroups(
            {i: {name: t.detach() for name, t in rows.items()} for i, rows in leaves.items()},
            {i: z.detach() for i, z in zeta.items()},
            loss.tolist(),
            (margin > 0).tolist(),
            steps.tolist(),
        )

    def _pass(self, samples: Sequence[Sample], rows: Tensor) -> _Pass:
        batch = self.collator.batch(samples, rows.tolist())
        with self.handle.disabled():
            prefix = run_prefix(self.model, self.decoder, batch, min(self.modules))
        work = _Pass(rows, rows + len(self.handle.edits) - len(samples), batch, prefix)
        layer = get_module(self.model, self.decoder.layer_name(prefix.first))
        with cases_named(self.handle, batch, self._selected(work)):
            work.attended = output_of(self._attention(prefix.first), layer, prefix.hidden, *prefix.calls[prefix.first])
        return work

    def _left(self, samples: Sequence[Sample], work: _Pass, left: Tensor) -> _Pass:
        """The pass of the edits `left`, some of those in `work`; that itself where so few are done that it is as well.

        Their states are picked from those there are; where it does not show how, they are computed again, which costs
        about half a step.
        """
        if 16 * len(left) > 15 * len(work.rows):
            return work
        if not work.looked and len(work.rows) > 2:  # the longest and the shortest: padded as all of them are
            lengths = work.batch.inputs["attention_mask"].sum(dim=1)
            two = work.rows[lengths.argsort(stable=True)[[0, -1]]]
            work.axes, work.looked = batch_axes(work.states(), self._pass(samples, two).states()), True
        if work.axes is None:
            if 4 * len(left) > 3 * len(work.rows):
                return work
            return replace(self._pass(samples, left), looked=work.looked)
        keep = torch.isin(work.rows, left).nonzero()[:, 0]
        hidden, calls, attended = narrowed(work.states(), work.axes, keep)
        return replace(
            work,
            rows=work.rows[keep],
            groups=work.groups[keep],
            batch=work.batch.narrowed(keep),
            prefix=Prefix(hidden, calls, work.prefix.first),
            attended=attended,
        )

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, owned: list[Tensor], done: Tensor) -> None:
        """One step of all but what finished edits own (Adam's momentum would still move it) and what would overflow."""
        before = [p.detach().clone() for p in owned]
        optimizer.step()
        with torch.no_grad():
            for p, old in zip(owned, before, strict=True):
                rows = done.repeat_interleave(len(p) // len(done)) | ~p.reshape(len(p), -1).isfinite().all(dim=1)
                p[rows] = old[rows]

    def _make_room(self, module: ExtraNeurons, edits: int) -> Rows:
        """Gives the module's last `edits` groups their sizes; returns the rows of the groups before them."""
        end = int(module.group_ptr[-1])
        sizes = self.config.per_layer * torch.arange(edits + 1)
        module.group_ptr[-edits - 1 :] = end + sizes.to(module.group_ptr)
        rows = {name: getattr(module, name) for name in ("keys", "key_bias", "values", "up", "up_bias")}
        return {name: t[:end].clone() for name, t in rows.items() if t is not None}

    def _selected(self, work: _Pass) -> Tensor | None:
        """The groups that act on each case: its own, or (None) all."""
        return work.groups[:, None] if self.independent else None

    def _attention(self, index: int) -> nn.Module:
        return get_module(self.model, self.decoder.layers[index].attention)

    def _tail(self, work: _Pass, *, whole: bool = False) -> Tensor:
        """[b, S, d] the decoder's output for the edits in `work`, each with its group (or all groups).

        Right where target tokens are predicted; everywhere (in the last layer's states, too) where `whole`.
        """
        last = len(self.decoder.layers) - 1

        def around(index: int) -> AbstractContextManager[None]:
            if index == last and not whole:
                return rows_only(self.model, self.decoder.layers[last], self.handle, _predicting(work.batch))
            if index == work.prefix.first and work.attended is not None:
                return replayed(self._attention(index), work.attended)
            return nullcontext()

        with cases_named(self.handle, work.batch, self._selected(work)):
            return run_tail(self.model, self.decoder, work.prefix, around)

    @torch.no_grad()
    def _ffn_inputs(self, work: _Pass) -> dict[int, Tensor]:
        """[B, S, d] what enters each edited FFN, the shift active, the new groups (of zeros) without effect."""
        modules = {i: get_module(self.model, self.decoder.layers[i].ffn_input) for i in self.modules}
        with recorded(modules, "input") as kept:
            self._tail(work, whole=True)
        return {i: x.reshape(*work.batch.shape, -1).float() for i, x in kept.items()}

    def _start(self, batch: Batch, inputs: dict[int, Tensor]) -> dict[int, Rows]:
        """Keys from the FFN inputs [B, S, d] that predict the target tokens, values of zero.

        With x0 such an input, m the mean input, and s the share of (x - m)'s projection on (x0 - m), a neuron's
        pre-activation is (s - theta) / (1 - theta): 1 at x0 itself, 0 where the share falls to theta.
        """
        theta, ne = self.config.key_threshold, self.config.per_layer
        generator = torch.Generator().manual_seed(self.config.seed)
        leaves = {}
        for i, x in inputs.items():
            mean = self.ffn_mean[i].to(x) if self.config.center_keys else torch.zeros_like(x[0, 0])
            predicting = [states[:-1][mask[1:]] for states, mask in zip(x, batch.target_mask, strict=True)]
            origin = torch.cat([rows[_spread(len(rows), ne)] for rows in predicting]) - mean  # [E * ne, d]
            size = origin.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            # the same for every edit, so that an edit does not depend on those trained beside it
            noise = torch.randn(ne, x.shape[-1], generator=generator, device="cpu", dtype=torch.float32).to(x)
            unit = origin / size + self.config.key_noise * (noise / x.shape[-1] ** 0.5).repeat(len(x), 1)
            keys = unit / size / (1 - theta)
            rows = {"keys": keys, "key_bias": -theta / (1 - theta) - keys @ mean, "values": torch.zeros_like(keys)}
            if self.decoder.layers[i].gated:  # up reads the same projection, so that act(gate) * up grows with it
                up = unit / size
                rows |= {"up": up, "up_bias": -(up @ mean)}
            leaves[i] = {name: t.clone().requires_grad_() for name, t in rows.items()}
        return leaves

    def _zeta(self, edits: int) -> dict[int, Tensor]:
        """zeta' [E, d] by layer: the one given, or what the maps being learned make of zeta."""
        zeta = {i: self.zeta[i].float().to(self.collator.device) for i in self.modules}
        if self.maps is not None:
            zeta = {i: self.maps[i] @ z for i, z in zeta.items()}
        return {i: z.expand(edits, -1).clone() for i, z in zeta.items()}

    def _optimizer(
        self, leaves: dict[int, Rows], zeta: dict[int, Tensor]
    ) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """Adam with the rates of the values, of everything else, of zeta' and of the maps; and what each edit owns."""
        named = [(name, t) for rows in leaves.values() for name, t in rows.items()]
        groups: list[dict[str, Any]] = [
            {"params": [t for name, t in named if name == "values"], "lr": self.config.lr_values},
            {"params": [t for name, t in named if name != "values"], "lr": self.config.lr_keys},
        ]
        if self.config.lr_zeta > 0 and self.maps is None:
            groups.append({"params": [z.requires_grad_() for z in zeta.values()], "lr": self.config.lr_zeta})
        owned = [p for group in groups for p in group["params"]]
        if self.maps is not None:
            groups.append({"params": list(self.maps.values()), "lr": self.lr_maps})
        return torch.optim.Adam(groups), owned

    def _install(self, leaves: dict[int, Rows], zeta: dict[int, Tensor], kept: dict[int, Rows]) -> None:
        """Puts the tensors being trained into the patch's modules, as `ExtraNeurons.load` would: zeta' folded in."""
        for i, module in self.modules.items():
            folded = leaves[i]["values"] + module.beta * zeta[i].repeat_interleave(self.config.per_layer, dim=0)
            for name, rows in (leaves[i] | {"values": folded}).items():
                setattr(module, name, torch.cat([kept[i][name], rows.to(kept[i][name].dtype)]))

    def _forward(self, work: _Pass) -> tuple[Tensor, Tensor]:
        """([b] mean negative log-likelihood of the target, [b] smallest logit margin over the target tokens)."""
        batch, hidden = work.batch, self._tail(work)
        at = batch.target_mask[:, 1:]  # [B, S - 1]
        logits = self.logits_step(hidden[:, :-1][at])  # [targets, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = batch.inputs["input_ids"][:, 1:][at]
        edit = at.nonzero()[:, 0]  # which edit each target token belongs to
        nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
        loss = nll.new_zeros(len(at)).index_add(0, edit, nll) / at.sum(dim=1)
        picked = logits.detach().gather(1, wanted[:, None])[:, 0]
        others = logits.detach().scatter(1, wanted[:, None], -torch.inf).amax(dim=1)
        margin = torch.full_like(loss.detach(), torch.inf).scatter_reduce(0, edit, picked - others, "amin")
        return loss, margin


def _predicting(batch: Batch) -> Tensor:
    """[P] rows of the B * S tokens that predict a target token; each case token is one of them."""
    return nn.functional.pad(batch.target_mask[:, 1:], (0, 1)).reshape(-1).nonzero()[:, 0]


def _spread(n: int, count: int) -> Tensor:
    """[count] indices into n rows: all in turn where there are few, evenly spread where there are more than count."""
    index = torch.arange(count)
    return index % n if n <= count else index * n // count
