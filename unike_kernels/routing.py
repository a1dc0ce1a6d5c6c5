"""Router: which edits act on a case, decided once, at the first edited layer (spec, section 3)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import RoutingConfig
from .edits import Calibration


class Router(nn.Module):
    """Which edits act on a case: the nearest by centred cosine at the first edited layer, above a calibrated threshold.

    keys [max_groups, d]: each edit's h_sem minus the centre, normalised; center [d]; threshold [] fp32: the score that
    a share `false_accept_rate` of the training-split cases exceeds for *some* edit, so it rises with their number.
    """

    keys: Tensor
    center: Tensor
    threshold: Tensor
    n_groups: Tensor

    def __init__(self, config: RoutingConfig, max_groups: int, like: Tensor, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        d = like.shape[-1]
        # fp32 whatever the model computes in: the threshold lies in the third digit of a cosine
        self.register_buffer("keys", torch.zeros(max_groups, d, device=like.device), persistent=False)
        self.register_buffer("center", torch.zeros(d, device=like.device), persistent=False)
        self.register_buffer("threshold", torch.zeros((), device=like.device), persistent=False)
        self.register_buffer("n_groups", torch.zeros((), dtype=torch.long, device=like.device), persistent=False)

    @torch.no_grad()
    def load(self, h_sem: Tensor, calibration: Calibration) -> None:
        """Takes the edits' h_sem [E, d] and calibrates the threshold for exactly these edits."""
        self.check(len(h_sem))
        device = self.keys.device
        center = calibration.center.float().to(device)
        keys = nn.functional.normalize(h_sem.float().to(device) - center, dim=-1)
        cases = nn.functional.normalize(calibration.cases.float().to(device) - center, dim=-1)
        self.keys.zero_()
        self.keys[: len(keys)].copy_(keys)
        self.center.copy_(center)
        self.threshold.fill_(calibrate(cases, keys, self.config.false_accept_rate))
        self.n_groups.fill_(len(keys))

    def check(self, groups: int) -> None:
        """Raises ValueError when that many edits do not fit."""
        if groups > len(self.keys):
            raise ValueError(f"room for {len(self.keys)} edits (max_groups at patch time), but got {groups}")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Router":
        exact = {name: getattr(self, name) for name in ("keys", "center", "threshold")}
        super()._apply(fn, *args, **kwargs)
        for name, tensor in exact.items():  # .half() and the like move nothing here and must round nothing
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [C, top] fp32, selected [C, top] int64, -1 padded) for the case tokens' tap [C, d]."""
        n = self.n_groups.expand(len(tap))
        ranges = torch.stack([torch.zeros_like(n), n], dim=1)
        centred = tap.detach().float() - self.center
        scores, selected = ops.cosine_topk(centred, self.keys, self.config.top, ranges=ranges, backend=self.backend)
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
