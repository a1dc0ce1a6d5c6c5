"""Router: which edits act on a case, decided once, at the first edited layer (spec, section 3)."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .choosing import ChoosesBackend
from .config import RoutingConfig
from .edits import Calibration
from .keeping import to_keep
from .reference_routing import SAME_QUESTION
from .room import lack, refuse
from .unchanged import Table, Written

CANDIDATES = 8  # of the edits nearest to a case, among which those are sought that ask what it asks


class Router(ChoosesBackend):
    """Which edits act on a case: the nearest by centred cosine at the first edited layer, where much nearer than usual.

    What counts is an edit's score less `crowding`: the mean score of the `cohort` training-split cases nearest to the
    case, since some cases are like everything, edits among it (speaker verification's adaptive score normalisation,
    Matejka et al., Interspeech 2017). It has to be above `threshold` [] fp32, what a share `false_accept_rate` of those
    cases reaches with *some* edit, which rises with their number; and above `margin`, since what is as near to many
    training cases is not the edit's. And the case has to ask what the edit asks: another question about an edit's own
    picture is as near as another picture of its thing. An edit's own question passes.
    keys [max_groups, d]: each edit's h_sem minus the centre, normalised; cases [max_cases, d] likewise; center [d].
    wording [max_wording, d] W: what of a state, less the centre, another wording of the question changes is taken out
    in part, x - W^T W x, before anything else (`editing.wording`).
    asking [max_asking, d] A: two states, so changed, ask the same where |A (x - y)| <= 1 (`editing.asking`); asks
    [max_groups, max_asking]: A x of each edit. All of it in plain torch: `reference_routing.routes`.
    """

    keys: Tensor
    cases: Tensor
    center: Tensor
    wording: Tensor
    asking: Tensor
    asks: Tensor
    threshold: Tensor
    n_groups: Tensor
    n_cases: Tensor

    def __init__(
        self,
        config: RoutingConfig,
        max_groups: int,
        like: Tensor,
        backend: str = "auto",
        *,
        max_cases: int = 0,
        max_wording: int = 0,
        max_asking: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        d = like.shape[-1]
        exact: dict[str, tuple[int, ...]] = {"keys": (max_groups, d), "cases": (max_cases, d), "center": (d,)}
        exact |= {"wording": (max_wording, d), "asking": (max_asking, d), "asks": (max_groups, max_asking)}
        # fp32 whatever the model computes in: the threshold lies in the third digit of a cosine
        for name, shape in {**exact, "threshold": ()}.items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=like.device)
            self.register_buffer(name, zeros, persistent=False)
        for name in ("n_groups", "n_cases"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=like.device), persistent=False)
        self._crowds = torch.zeros(0)
        self._crowds_of = Written()
        self.choose(backend)

    @classmethod
    def fitting(
        cls, calibration: Calibration, config: RoutingConfig, max_groups: int, like: Tensor, backend: str = "auto"
    ) -> "Router":
        """A router with room for this calibration."""
        _, cases, wording, asking = calibration.sizes
        room = {"max_cases": cases, "max_wording": wording, "max_asking": asking if config.asking else 0}
        return cls(config, max_groups, like, backend, **room)

    @torch.no_grad()
    def load(self, h_sem: Tensor, calibration: Calibration) -> None:
        """Takes the edits' h_sem [E, d] and calibrates the threshold for exactly these edits.

        A case that asks what one of them asks does not compete with it.
        """
        refuse(self.lacks(len(h_sem), calibration))
        device = self.keys.device
        for name, part in self._learned(calibration).items():
            getattr(self, name).zero_()
            if part is not None:
                getattr(self, name)[: len(part)].copy_(part)
        self.center.copy_(calibration.center)
        edits, cases = self._centred(h_sem.to(device)), self._centred(calibration.cases.to(device))
        asked, asks = edits @ self.asking.T, cases @ self.asking.T  # [E, a], [M, a]
        keys, cases = nn.functional.normalize(edits, dim=-1), nn.functional.normalize(cases, dim=-1)
        self.keys.zero_()
        self.keys[: len(keys)].copy_(keys)
        self.asks.zero_()
        self.asks[: len(asked)].copy_(asked)
        best = nearest(cases, keys, asks, asked)
        reached = best - self._crowding(calibration, cases)
        self.threshold.fill_(calibrate(reached, self.config.false_accept_rate))
        self.n_groups.fill_(len(keys))
        others = cases[best < SAME_QUESTION]
        self.cases.zero_()
        self.cases[: len(others)].copy_(others)
        self.n_cases.fill_(len(others))

    def _crowding(self, calibration: Calibration, cases: Tensor) -> Tensor:
        """`crowding` [M] of the calibration's cases, kept from one load to the next: it does not hang on the edits."""
        parts = (calibration.center, calibration.cases, calibration.wording)
        made_of: list[Table] = [[part] for part in parts if part is not None]
        if not self._crowds_of.all_alike([self._crowds], made_of):
            self._crowds = crowding(cases, self.config.cohort)
            self._crowds_of.note([self._crowds], made_of)
        return self._crowds.to(cases.device)

    def lacks(self, groups: int, calibration: Calibration) -> list[str]:
        """What does not fit into the storage: that many edits, the calibration's cases, what was learned of them."""
        found = lack(len(self.keys), groups, "edits (max_groups at patch time)")
        found += lack(len(self.cases), len(calibration.cases), "calibration cases (as patched)")
        for name, part in self._learned(calibration).items():
            if part is not None:
                found += lack(len(getattr(self, name)), len(part), f"directions of {name} (as patched)")
        return found

    def _learned(self, calibration: Calibration) -> dict[str, Tensor | None]:
        """The directions that were learned of a calibration's cases, and matter here."""
        return {"wording": calibration.wording, "asking": calibration.asking if self.config.asking else None}

    @to_keep()
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Router":
        exact = {
            name: getattr(self, name) for name in ("keys", "cases", "center", "wording", "asking", "asks", "threshold")
        }
        super()._apply(fn, *args, **kwargs)
        for name, tensor in exact.items():  # .half() and the like move nothing here and must round nothing
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [C, top] fp32, selected [C, top] int64, -1 padded) for the case tokens' tap [C, d]."""
        kind = tap.device.type
        off = kind != "meta" and torch.is_autocast_enabled(kind)  # it would round what is asked to half precision
        with torch.autocast(kind, enabled=False) if off else nullcontext():
            centred = self._centred(tap.detach())
            scores, selected = self._nearest(centred)
        others, _ = self._search(centred, self.cases, self.n_cases, self.config.cohort)  # [C, cohort], best first
        floor = self.threshold.clamp(min=self.config.margin)
        bar = average(others) + floor.where(self.threshold.isfinite(), -torch.inf)  # of no case: nothing to protect
        own = (scores >= SAME_QUESTION) & (scores > others[:, :1])
        return scores, torch.where((scores > bar) | own, selected, -1)

    def _nearest(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, selected) [C, top] of the edits nearest to the states [C, d] that ask what these ask."""
        if len(self.asking) == 0 or len(self.keys) == 0:
            return self._search(centred, self.keys, self.n_groups, self.config.top)
        scores, selected = self._search(centred, self.keys, self.n_groups, max(self.config.top, CANDIDATES))
        apart = self.asks[selected.clamp(min=0)] - (centred @ self.asking.T)[:, None]  # [C, candidates, a]
        scores = scores.masked_fill(apart.square().sum(dim=-1) > 1, -torch.inf)
        scores, order = scores.topk(self.config.top)
        return scores, selected.gather(-1, order)

    def _centred(self, states: Tensor) -> Tensor:
        """[C, d] fp32 of states [C, d]: without the centre, and with less of what wording changes."""
        x = states.float() - self.center
        return x - (x @ self.wording.T) @ self.wording if len(self.wording) else x

    def _search(self, q: Tensor, keys: Tensor, n: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores, indices) [C, k] among the first n [] of `keys`, a number that stays on the device."""
        ranges = torch.stack([torch.zeros_like(n), n]).expand(len(q), 2)
        return ops.cosine_topk(q, keys, k, ranges=ranges, backend=self.kernels)

    def extra_repr(self) -> str:
        c = self.config
        return f"top={c.top}, false_accept_rate={c.false_accept_rate}, cohort={c.cohort}, margin={c.margin}"


def nearest(cases: Tensor, keys: Tensor, asks: Tensor, asked: Tensor) -> Tensor:
    """[M] the largest cosine of each case with any key that asks the same; -1 where there is none.

    cases [M, d], keys [E, d]: units; asks [M, a], asked [E, a]: what they ask, the same up to a distance of 1.
    """
    if len(keys) == 0:
        return cases.new_full((len(cases),), -1.0)
    found = [cases[:0, 0]]
    for part, ask in zip(cases.split(4096), asks.split(4096), strict=True):
        apart = torch.cdist(ask, asked, compute_mode="donot_use_mm_for_euclid_dist") > 1  # [4096, E]
        found.append((part @ keys.T).masked_fill(apart, -1.0).amax(dim=1))
    return torch.cat(found)


def average(scores: Tensor) -> Tensor:
    """[C, 1] the mean of the scores [C, n] that are of something; 0 where none is (all are -inf)."""
    found = scores.isfinite()
    return scores.where(found, 0.0).sum(-1, keepdim=True) / found.sum(-1, keepdim=True).clamp(min=1)


def crowding(cases: Tensor, cohort: int) -> Tensor:
    """[M] the mean cosine of each case with the `cohort` nearest others: cases [M, d], units.

    Another phrasing of the same question is none of the others: a case that is asked later has none among them.
    """
    means = []
    for part in cases.split(1024):
        likeness = part @ cases.T  # [1024, M]
        others = likeness.masked_fill(likeness >= SAME_QUESTION, -torch.inf)
        means.append(average(others.topk(min(cohort, len(cases)), dim=-1).values)[:, 0])
    return torch.cat(means) if means else cases.new_zeros(0)


def calibrate(best: Tensor, false_accept_rate: float) -> float:
    """The threshold that `false_accept_rate` of the cases exceed: best [M], each one's best score, -1 without a key.

    At most floor(rate * M) cases score above it. With no case it is -inf: there is nothing to protect.
    """
    if len(best) == 0:
        return -math.inf
    allowed = int(false_accept_rate * len(best))
    return float(best.sort(descending=True).values[min(allowed, len(best) - 1)])
