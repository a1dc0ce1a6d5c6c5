"""The drop-in modules that own an edit's tensors at one site, and say what the site adds.

They are children of the site's own module and are called by the hooks in `patching`; they never see a batch
dimension: tokens are flattened, and `Cases` says which token belongs to which case.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .cases import Cases, LayerDecision
from .config import RoutingConfig, ShiftConfig
from .edits import Calibration, LayerEdits
from .memory import ExternalMemory
from .models import LayerSites


class ExtraNeurons(nn.Module):
    """The extra neurons of every edit at one FFN (equations 3 and 6), in CSR groups, one group per edit.

    keys, values [n, d]; key_bias [n]; up [n, d] and up_bias [n] in a gated FFN; group_ptr [G + 1]. beta * zeta' is
    folded into the values when the edits are loaded. While an edit is trained, `zeta` [G, d] stays apart.
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor
    up: Tensor | None
    up_bias: Tensor | None
    group_ptr: Tensor
    zeta: Tensor | None

    def __init__(
        self, edits: LayerEdits, act: str, beta: float, *, like: Tensor, max_groups: int, max_neurons: int
    ) -> None:
        super().__init__()
        self.act, self.beta = act, beta
        d = edits.keys.shape[1]
        empty = {"keys": (max_neurons, d), "key_bias": (max_neurons,), "values": (max_neurons, d)}
        if edits.up is not None:
            empty |= {"up": (max_neurons, d), "up_bias": (max_neurons,)}
        else:
            self.up = self.up_bias = None
        for name, shape in empty.items():
            self.register_buffer(name, like.new_zeros(shape), persistent=False)
        pointers = torch.zeros(max_groups + 1, dtype=torch.long, device=like.device)
        self.register_buffer("group_ptr", pointers, persistent=False)
        self.zeta = None
        self.load(edits)

    @property
    def max_groups(self) -> int:
        """Groups that fit into the storage."""
        return self.group_ptr.shape[0] - 1

    def check(self, edits: LayerEdits) -> None:
        """Raises ValueError when the edits do not fit into the storage."""
        groups, neurons = len(edits.group_ptr) - 1, len(edits.keys)
        if groups > self.max_groups:
            raise ValueError(f"room for {self.max_groups} edits (max_groups at patch time), but got {groups}")
        if neurons > len(self.keys):
            raise ValueError(f"room for {len(self.keys)} neurons (max_neurons at patch time), but got {neurons}")

    @torch.no_grad()
    def load(self, edits: LayerEdits) -> None:
        """Replaces all groups, in place; beta * zeta' is folded into the values in fp32, rounded once."""
        self.check(edits)
        n = len(edits.keys)
        sizes = edits.group_ptr[1:] - edits.group_ptr[:-1]
        zeta = torch.repeat_interleave(edits.zeta.float(), sizes, dim=0)  # [n, d]
        rows = {"keys": edits.keys, "key_bias": edits.key_bias, "values": edits.values.float() + self.beta * zeta}
        if edits.up is not None and edits.up_bias is not None:
            rows |= {"up": edits.up, "up_bias": edits.up_bias}
        for name, tensor in rows.items():
            storage = getattr(self, name)
            storage[:n].copy_(tensor)
            storage[n:].zero_()
        self.group_ptr.fill_(n)  # spare groups are empty
        self.group_ptr[: len(edits.group_ptr)].copy_(edits.group_ptr)

    def forward(self, x: Tensor, token_to_case: Tensor | None, selected: Tensor | None) -> Tensor:
        """[..., d] what the groups add for x [..., d]: every group, or per case those in `selected` [C, m]."""
        return ops.extra_neurons(
            x,
            self.keys,
            self.key_bias,
            self.values,
            act=self.act,
            up=self.up,
            up_bias=self.up_bias,
            zeta=self.zeta,
            beta=self.beta,
            group_ptr=self.group_ptr,
            token_to_case=None if selected is None else token_to_case,
            selected=selected,
        )

    def extra_repr(self) -> str:
        return f"max_neurons={len(self.keys)}, max_groups={self.max_groups}, act={self.act}"


class Router(nn.Module):
    """Which edits act on a case: the nearest by centred cosine at the first edited layer, above a calibrated threshold.

    keys [max_groups, d]: each edit's h_sem minus the centre, normalised; center [d]; threshold [] fp32: the score that
    a share `false_accept_rate` of the training-split cases exceeds for *some* edit, so it rises with their number.
    """

    keys: Tensor
    center: Tensor
    threshold: Tensor
    n_groups: Tensor

    def __init__(self, config: RoutingConfig, max_groups: int, like: Tensor) -> None:
        super().__init__()
        self.config = config
        d = like.shape[-1]
        # fp32 whatever the model computes in: the threshold lies in the third digit of a cosine
        self.register_buffer("keys", torch.zeros(max_groups, d, device=like.device), persistent=False)
        self.register_buffer("center", torch.zeros(d, device=like.device), persistent=False)
        self.register_buffer("threshold", torch.zeros((), device=like.device), persistent=False)
        self.register_buffer("n_groups", torch.zeros((), dtype=torch.long, device=like.device), persistent=False)

    @torch.no_grad()
    def load(self, h_sem: Tensor, calibration: Calibration) -> None:
        """Takes the edits' h_sem [E, d] and calibrates the threshold for exactly these edits."""
        device = self.keys.device
        center = calibration.center.float().to(device)
        keys = nn.functional.normalize(h_sem.float().to(device) - center, dim=-1)
        cases = nn.functional.normalize(calibration.cases.float().to(device) - center, dim=-1)
        self.keys.zero_()
        self.keys[: len(keys)].copy_(keys)
        self.center.copy_(center)
        self.threshold.fill_(calibrate(cases, keys, self.config.false_accept_rate))
        self.n_groups.fill_(len(keys))

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [C, top] fp32, selected [C, top] int64, -1 padded) for the case tokens' tap [C, d]."""
        n = self.n_groups.expand(len(tap))
        ranges = torch.stack([torch.zeros_like(n), n], dim=1)
        centred = tap.detach().float() - self.center
        scores, selected = ops.cosine_topk(centred, self.keys, self.config.top, ranges=ranges)
        return scores, torch.where(scores > self.threshold, selected, -1)

    def extra_repr(self) -> str:
        return f"top={self.config.top}, false_accept_rate={self.config.false_accept_rate}"


def calibrate(cases: Tensor, keys: Tensor, false_accept_rate: float) -> float:
    """The threshold that `false_accept_rate` of the cases exceed for some key: cases [M, d], keys [E, d], unit rows.

    At most floor(rate * M) cases score above it. With no case or no key the threshold is -1: nothing to protect.
    """
    if len(cases) == 0 or len(keys) == 0:
        return -1.0
    best = torch.cat([(part @ keys.T).amax(dim=1) for part in cases.split(4096)])
    allowed = int(false_accept_rate * len(best))
    return float(best.sort(descending=True).values[min(allowed, len(best) - 1)])


class KnowledgeShift(nn.Module):
    """The shift of one self-attention output towards the memory's knowledge (equations 2, 7 and 8).

    encoder_weight_i [d, d], encoder_bias_i [d]: Enc_sem's layers.
    """

    def __init__(
        self,
        config: ShiftConfig,
        layer: int,
        sites: LayerSites,
        memory: ExternalMemory,
        encoder: tuple[tuple[Tensor, Tensor], ...],
        encoder_act: str,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.encoder_act = config, layer, encoder_act
        self.heads, self.head_dim, self.scaling, self.softcap = (
            sites.heads,
            sites.head_dim,
            sites.scaling,
            sites.softcap,
        )
        self.memory = memory
        self.depth = len(encoder)
        for i, (weight, bias) in enumerate(encoder):
            self.register_buffer(f"encoder_weight_{i}", weight.to(like), persistent=False)
            self.register_buffer(f"encoder_bias_{i}", bias.to(like), persistent=False)

    @property
    def encoder(self) -> list[tuple[Tensor, Tensor]]:
        """Enc_sem's layers as (weight, bias) pairs."""
        return [(getattr(self, f"encoder_weight_{i}"), getattr(self, f"encoder_bias_{i}")) for i in range(self.depth)]

    def forward(
        self, tap: Tensor, h_att: Tensor, attention: nn.Module, projections: "Projections", cases: Cases
    ) -> Tensor:
        """h [T, d] for the tap [T, d] and the attention output h_att [T, d] of the layer's `attention` module."""
        if self.config.k == 0 or self.memory.capacity == 0:
            return h_att
        rows = cases.rows(self.config.positions)
        q = projections.query(attention, tap) if self.config.attention == "projected" else tap
        if self.config.per == "token":
            indices, alpha, rows = self._per_token(tap, rows, cases)
        else:
            decision = self._decide(tap, q, h_att, attention, projections, cases)
            indices, alpha = decision.indices, decision.alpha
        h, _ = self._shift(h_att, q, indices, attention, projections, alpha=alpha, token_to_case=rows)
        return h

    def _decide(
        self, tap: Tensor, q: Tensor, h_att: Tensor, attention: nn.Module, projections: "Projections", cases: Cases
    ) -> LayerDecision:
        """Items and alpha of every case: computed where the case token is in this pass, kept where it is not."""
        before = cases.state.layers.get(self.layer)
        if cases.decided and before is not None:
            return before
        at = cases.case_tokens.clamp(min=0)  # [C]
        scores, indices = self.memory.search(tap[at].detach(), self.config.k, cases.state.selected)
        fixed = self.config.alpha
        if fixed is None:
            _, alpha = self._shift(h_att[at], q[at], indices, attention, projections)
        else:
            alpha = torch.full_like(scores[:, 0], fixed).to(h_att.dtype)
        if cases.state.selected is not None:  # an unrouted case passes bit for bit: no items, whatever the orientation
            routed = (cases.state.selected >= 0).any(dim=1)
            indices = torch.where(routed[:, None], indices, -1)
            scores = torch.where(routed[:, None], scores, -torch.inf)
            alpha = torch.where(routed, alpha, 0.0)
        if before is not None and not cases.fresh:
            new = cases.case_tokens >= 0
            indices = torch.where(new[:, None], indices, before.indices)
            scores = torch.where(new[:, None], scores, before.scores)
            alpha = torch.where(new, alpha, before.alpha.to(alpha))
        decision = LayerDecision(indices, scores, alpha)
        cases.state.layers[self.layer] = decision
        return decision

    def _per_token(self, tap: Tensor, rows: Tensor, cases: Cases) -> tuple[Tensor, float | None, None]:
        """Items of every token, -1 for tokens of no (routed) case; alpha is left to the operator, per token."""
        selected = cases.state.selected
        per_token = None if selected is None else selected[cases.token_to_case.clamp(min=0)]
        _, indices = self.memory.search(tap.detach(), self.config.k, per_token)
        acts = rows >= 0
        if per_token is not None:
            acts = acts & (per_token >= 0).any(dim=1)
        return torch.where(acts[:, None], indices, -1), self.config.alpha, None

    def _shift(
        self,
        h_input: Tensor,
        q: Tensor,
        indices: Tensor,
        attention: nn.Module,
        projections: "Projections",
        alpha: Tensor | float | None = None,
        token_to_case: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(h, alpha): one operator call where the output projection is a plain linear map, otherwise around it."""
        raw = self.config.attention == "raw"
        weights = None if raw else projections.plain_output(attention)
        same: dict[str, Any] = {
            "encoder": self.encoder or None,
            "encoder_act": self.encoder_act,
            "orientation": self.config.orientation,
            "clamp": self.config.clamp,
        }
        if raw or weights is not None:
            return ops.knowledge_shift(
                h_input,
                q,
                self.memory.keys,
                self.memory.values,
                indices,
                alpha=alpha,
                token_to_case=token_to_case,
                out_proj=weights,
                scaling=None if raw else self.scaling,
                softcap=self.softcap,
                **same,
            )
        # A quantised, adapted or offloaded projection is called, never read: attention over the items first (alpha 1
        # gives h_know itself), the projection, then the mix.
        flat = q.reshape(len(q), -1)
        heads, _ = ops.knowledge_shift(
            torch.zeros_like(flat),
            q,
            self.memory.keys,
            self.memory.values,
            indices,
            alpha=1.0,
            token_to_case=token_to_case,
            scaling=self.scaling,
            softcap=self.softcap,
        )
        h_know = projections.output(attention, heads)
        if alpha is None:
            encode = (lambda h: reference.encode(h, self.encoder, self.encoder_act)) if self.depth else None
            alpha = reference.alpha(h_know, h_input, encoder=encode, clamp=self.config.clamp)
        found = (indices >= 0).any(dim=1)
        strength = torch.as_tensor(alpha, device=h_input.device, dtype=h_input.dtype).expand(len(indices))
        acts = found
        if token_to_case is not None:
            case = token_to_case.clamp(min=0)
            strength, acts = strength[case], found[case] & (token_to_case >= 0)
        mixed = reference.shift(h_input, h_know, strength, orientation=self.config.orientation)
        nothing = 0.0 if self.config.orientation == "knowledge" else 1.0
        return torch.where(acts[:, None], mixed, h_input), torch.where(found, torch.as_tensor(alpha), nothing)

    def extra_repr(self) -> str:
        return f"layer={self.layer}, k={self.config.k}, attention={self.config.attention}, alpha={self.config.alpha}"


class Projections:
    """A self-attention's own projections as the shift uses them: called as modules, names relative to the attention."""

    def __init__(self, sites: LayerSites) -> None:
        self.sites = sites
        self.below = len(sites.attention) + 1

    def _get(self, attention: nn.Module, name: str) -> nn.Module:
        return attention.get_submodule(name[self.below :])

    def query(self, attention: nn.Module, tap: Tensor) -> Tensor:
        """q [T, heads, head_dim] of the tap [T, d], not rotated: a memory has no position."""
        q = self._get(attention, self.sites.q_proj)(tap).unflatten(-1, (self.sites.heads, self.sites.head_dim))
        return self._get(attention, self.sites.q_norm)(q) if self.sites.q_norm else q

    def item(self, attention: nn.Module, h_pos: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v), each [N, kv_heads, head_dim], of items' h_pos [N, d]."""
        shape = (self.sites.kv_heads, self.sites.head_dim)
        k = self._get(attention, self.sites.k_proj)(h_pos).unflatten(-1, shape)
        v = self._get(attention, self.sites.v_proj)(h_pos).unflatten(-1, shape)
        return (self._get(attention, self.sites.k_norm)(k) if self.sites.k_norm else k), v

    def output(self, attention: nn.Module, heads: Tensor) -> Tensor:
        """[T, d] of the concatenated heads [T, heads * head_dim]."""
        return self._get(attention, self.sites.out_proj)(heads)

    def plain_output(self, attention: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of the output projection when it is exactly nn.Linear with its weight at hand."""
        out = self._get(attention, self.sites.out_proj)
        hooked = out._forward_hooks or out._forward_pre_hooks or hasattr(out, "_hf_hook")
        if type(out) is not nn.Linear or hooked or out.weight.device.type == "meta":
            return None
        return out.weight, out.bias
