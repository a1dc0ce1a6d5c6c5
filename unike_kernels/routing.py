"""Router: which edits act on a case, decided once, at the first edited layer (spec, section 3)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .choosing import ChoosesBackend
from .config import RoutingConfig
from .edits import Calibration

SAME_QUESTION = 0.99  # centred cosine; other phrasings of one question reach 0.998, other pictures of one thing 0.7


class Router(ChoosesBackend):
    """Which edits act on a case: the nearest by centred cosine at the first edited layer, where much nearer than usual.

    What counts is an edit's score less `crowding`: the mean score of the `cohort` training-split cases nearest to the
    case, since some cases are like everything, edits among it (speaker verification's adaptive score normalisation,
    Matejka et al., Interspeech 2017). It has to be above `threshold` [] fp32, what a share `false_accept_rate` of those
    cases reaches with *some* edit, which rises with their number; and above `margin`, since what is as near to many
    training cases, such as another question about an edit's picture, is not the edit's. An edit's own question passes.
    keys [max_groups, d]: each edit's h_sem minus the centre, normalised; cases [max_cases, d] likewise; center [d].
    wording [max_wording, d] W: what of a state, less the centre, another wording of the question changes is taken out
    in part, x - W^T W x, wherever a cosine is taken (`editing.wording`).
    """

    keys: Tensor
    cases: Tensor
    center: Tensor
    wording: Tensor
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
    ) -> None:
        super().__init__()
        self.config = config
        d = like.shape[-1]
        # fp32 whatever the model computes in: the threshold lies in the third digit of a cosine
        self.register_buffer("keys", torch.zeros(max_groups, d, device=like.device), persistent=False)
        self.register_buffer("cases", torch.zeros(max_cases, d, device=like.device), persistent=False)
        self.register_buffer("center", torch.zeros(d, device=like.device), persistent=False)
        self.register_buffer("wording", torch.zeros(max_wording, d, device=like.device), persistent=False)
        self.register_buffer("threshold", torch.zeros((), device=like.device), persistent=False)
        for name in ("n_groups", "n_cases"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=like.device), persistent=False)
        self._crowds: tuple[list[tuple[Tensor, int]], Tensor] | None = None  # of which tensors, as they were: crowding
        self.choose(backend)

    @torch.no_grad()
    def load(self, h_sem: Tensor, calibration: Calibration) -> None:
        """Takes the edits' h_sem [E, d] and calibrates the threshold for exactly these edits.

        A case that asks what one of them asks does not compete with it.
        """
        self.check(len(h_sem), calibration)
        device = self.keys.device
        self.wording.zero_()
        if calibration.wording is not None:
            self.wording[: len(calibration.wording)].copy_(calibration.wording)
        self.center.copy_(calibration.center)
        keys = nn.functional.normalize(self._centred(h_sem.to(device)), dim=-1)
        cases = nn.functional.normalize(self._centred(calibration.cases.to(device)), dim=-1)
        self.keys.zero_()
        self.keys[: len(keys)].copy_(keys)
        best = nearest(cases, keys)
        reached = best - self._crowding(calibration, cases)
        self.threshold.fill_(calibrate(reached, self.config.false_accept_rate))
        self.n_groups.fill_(len(keys))
        others = cases[best < SAME_QUESTION]
        self.cases.zero_()
        self.cases[: len(others)].copy_(others)
        self.n_cases.fill_(len(others))

    def _crowding(self, calibration: Calibration, cases: Tensor) -> Tensor:
        """`crowding` [M] of the calibration's cases, kept from one load to the next: it does not hang on the edits."""
        made_of = [calibration.center, calibration.cases]
        made_of += [] if calibration.wording is None else [calibration.wording]
        if any(t.is_inference() for t in made_of):  # of those nobody counts the changes
            return crowding(cases, self.config.cohort)
        kept = self._crowds
        if kept is None or [(id(t), v) for t, v in kept[0]] != [(id(t), t._version) for t in made_of]:
            kept = self._crowds = [(t, t._version) for t in made_of], crowding(cases, self.config.cohort)
        return kept[1].to(cases.device)

    def check(self, groups: int, calibration: Calibration) -> None:
        """Raises ValueError when that many edits, or the calibration, do not fit."""
        if groups > len(self.keys):
            raise ValueError(f"room for {len(self.keys)} edits (max_groups at patch time), but got {groups}")
        _, cases, wording = calibration.sizes
        if cases > len(self.cases):
            raise ValueError(f"room for {len(self.cases)} calibration cases (as patched), but got {cases}")
        if wording > len(self.wording):
            raise ValueError(f"room for {len(self.wording)} directions of wording (as patched), but got {wording}")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Router":
        exact = {name: getattr(self, name) for name in ("keys", "cases", "center", "wording", "threshold")}
        super()._apply(fn, *args, **kwargs)
        for name, tensor in exact.items():  # .half() and the like move nothing here and must round nothing
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(self, tap: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [C, top] fp32, selected [C, top] int64, -1 padded) for the case tokens' tap [C, d]."""
        centred = self._centred(tap.detach())
        scores, selected = self._search(centred, self.keys, self.n_groups, self.config.top)
        if len(self.cases) == 0:
            return scores, torch.where(scores > self.threshold, selected, -1)
        others, _ = self._search(centred, self.cases, self.n_cases, self.config.cohort)  # [C, cohort], best first
        bar = average(others) + self.threshold.clamp(min=self.config.margin)
        own = (scores >= SAME_QUESTION) & (scores > others[:, :1])
        return scores, torch.where((scores > bar) | own, selected, -1)

    def _centred(self, states: Tensor) -> Tensor:
        """[C, d] fp32 of states [C, d]: without the centre, and with less of what wording changes."""
        x = states.float() - self.center
        return x - (x @ self.wording.T) @ self.wording if len(self.wording) else x

    def _search(self, q: Tensor, keys: Tensor, n: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores, indices) [C, k] among the first n [] of `keys`, a number that stays on the device."""
        ranges = torch.stack([torch.zeros_like(n), n]).expand(len(q), 2)
        return ops.cosine_topk(q, keys, k, ranges=ranges, backend=self.backend)

    def extra_repr(self) -> str:
        c = self.config
        return f"top={c.top}, false_accept_rate={c.false_accept_rate}, cohort={c.cohort}, margin={c.margin}"


def nearest(cases: Tensor, keys: Tensor) -> Tensor:
    """[M] the largest cosine of each case with any key; -1 where there is no key. cases [M, d], keys [E, d]: units."""
    if len(keys) == 0:
        return cases.new_full((len(cases),), -1.0)
    return torch.cat([cases[:0, 0], *((part @ keys.T).amax(dim=1) for part in cases.split(4096))])


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

    At most floor(rate * M) cases score above it. With no case the threshold is -1: nothing to protect.
    """
    if len(best) == 0:
        return -1.0
    allowed = int(false_accept_rate * len(best))
    return float(best.sort(descending=True).values[min(allowed, len(best) - 1)])
