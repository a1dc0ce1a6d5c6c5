"""ExtraNeurons: the extra neurons of every edit at one FFN, as they are computed."""

from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels, ops, reference
from .cases import Cases
from .choosing import ChoosesBackend
from .edits import LayerEdits
from .room import lack, refuse
from .unchanged import Table, Written


class ExtraNeurons(ChoosesBackend):
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
        self,
        edits: LayerEdits,
        act: str,
        beta: float,
        *,
        like: Tensor,
        max_groups: int,
        max_neurons: int,
        backend: str = "auto",
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
        self.written = Written()
        self.choose(backend)
        self.load(edits)

    @property
    def max_groups(self) -> int:
        """Groups that fit into the storage."""
        return self.group_ptr.shape[0] - 1

    def lacks(self, edits: LayerEdits) -> list[str]:
        """What of these edits does not fit into the storage."""
        groups = lack(self.max_groups, len(edits.group_ptr) - 1, "edits (max_groups at patch time)")
        return groups + lack(len(self.keys), len(edits.keys), "neurons (max_neurons at patch time)")

    @torch.no_grad()
    def load(self, edits: LayerEdits) -> None:
        """Replaces all groups, in place; beta * zeta' is folded into the values in fp32, rounded once.

        Only rows behind the first that differs from what is there are written.
        """
        refuse(self.lacks(edits))
        n, ends, tables = len(edits.keys), edits.group_ptr[1:], _tables(edits)
        rows, groups = self.written.alike(self._storage(), tables)
        start = min(rows, int(ends[groups - 1]) if groups else 0)
        wide = reference.compute_dtype(edits.values, self.values)
        owner = torch.repeat_interleave(edits.group_ptr.diff().to(edits.zeta.device))[start:]  # [n - start]
        values = edits.values[start:].to(wide) + self.beta * edits.zeta[owner].to(wide)
        fresh = {"keys": edits.keys[start:], "key_bias": edits.key_bias[start:], "values": values}
        if edits.up is not None and edits.up_bias is not None:
            fresh |= {"up": edits.up[start:], "up_bias": edits.up_bias[start:]}
        for name, tensor in fresh.items():
            storage = getattr(self, name)
            storage[start:n].copy_(tensor)
            storage[n:].zero_()
        self.group_ptr.fill_(n)  # spare groups are empty
        self.group_ptr[: len(edits.group_ptr)].copy_(edits.group_ptr)
        self.written.note(self._storage(), tables)

    def _storage(self) -> list[Tensor]:
        return [self.keys, self.key_bias, self.values, *_there(self.up, self.up_bias), self.group_ptr]

    def forward(self, x: Tensor, token_to_case: Tensor | None, selected: Tensor | None) -> Tensor:
        """[..., d] what the groups add for x [..., d]: every group, or per case those in `selected` [C, m]."""
        neurons = (self.keys, self.key_bias, self.values)
        return ops.extra_neurons(x, *neurons, **self._options(token_to_case, selected))

    def add_(self, y: Tensor, x: Tensor, token_to_case: Tensor | None, selected: Tensor | None) -> None:
        """Adds that to y [..., d] in place: one operator, and nothing else touches y. For inference."""
        neurons = (self.keys, self.key_bias, self.values)
        ops.extra_neurons_(y, x, *neurons, **self._options(token_to_case, selected))

    def add_natively(self, y: Tensor, x: Tensor, cases: Cases) -> bool:
        """`add_` of the pass's cases past torch's dispatcher, where they are `native`; whether it was done."""
        step = cases.steps.get(self)
        if step is not None and self.zeta is None:
            done = step(y, x)
            if done is not None:
                return done
        if self._parameters or self.zeta is not None or self.backend not in cpu_kernels.BACKENDS:
            return False  # an edit is being trained
        selected = cases.state.selected
        rows = None if selected is None else cases.token_to_case
        step = cases.steps[self] = cpu_kernels.neurons_step(x, self._buffers, rows, selected, self.act)
        return step is not None and bool(step(y, x))

    def _options(self, token_to_case: Tensor | None, selected: Tensor | None) -> dict[str, Any]:
        return {
            "act": self.act,
            "up": self.up,
            "up_bias": self.up_bias,
            "zeta": self.zeta,
            "beta": self.beta,
            "group_ptr": self.group_ptr,
            "token_to_case": None if selected is None else token_to_case,
            "selected": selected,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        return f"max_neurons={len(self.keys)}, max_groups={self.max_groups}, act={self.act}"


def _tables(edits: LayerEdits) -> list[Table]:
    """What is written: for each neuron, and for each group."""
    neurons = [edits.keys, edits.key_bias, edits.values, *_there(edits.up, edits.up_bias)]
    return [neurons, [edits.group_ptr[1:], edits.zeta]]


def _there(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]
