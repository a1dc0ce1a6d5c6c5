"""The specification of routing, which the paper does not have: which edits act on which case, in plain PyTorch."""

import math

import torch.nn.functional as F
from torch import Tensor

from .reference import Maybe, _unit, _wide

SAME_QUESTION = 0.99  # centred cosine; other phrasings of one question reach 0.998, other pictures of one thing 0.7


def routes(
    x: Tensor, edits: Tensor, cases: Tensor, center: Tensor, *,
    top: int, rate: float, cohort: int, margin: float, wording: Maybe = None, asking: Maybe = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which of E edits act on C cases: (scores [C, top], best first, edits [C, top] int64, -1: none). Ours (spec, 3).

    x [C, d], edits [E, d], cases [M, d] of training questions that no edit should claim, center [d]: states of case
    tokens, each taken less the centre and with W^T W of it taken out, W = wording [r, d]. An edit's score is its
    cosine, where |A (x - edit)| <= 1, A = asking [a, d]: elsewhere another question is asked. It acts where the score
    less the mean cosine of the `cohort` nearest cases is above `margin`, and above what a share `rate` of the cases
    reaches likewise; or where it is the case's own question. Without cases every edit that asks the same acts.
    """
    x, edits, cases, center, wording, asking = _wide(x, edits, cases, center, wording, asking)
    x, edits, cases = (s - center for s in (x, edits, cases))
    if wording is not None:
        x, edits, cases = (s - (s @ wording.T) @ wording for s in (x, edits, cases))

    def scores(of: Tensor, none: float) -> Tensor:  # [., E]
        found = _unit(of) @ _unit(edits).T
        if asking is None:
            return found
        apart = (of @ asking.T)[:, None] - (edits @ asking.T)[None]  # [., E, a]
        return found.masked_fill(apart.square().sum(-1) > 1, none)

    def crowd(cosines: Tensor) -> Tensor:  # [., M] -> [.], of those that are not -inf
        nearest = cosines.topk(min(cohort, cosines.shape[1])).values
        found = nearest.isfinite()
        return nearest.where(found, 0.0).sum(-1) / found.sum(-1).clamp(min=1)

    top_scores, acting = F.pad(scores(x, -math.inf), (0, top), value=-math.inf).topk(top)
    acting = acting.where(top_scores.isfinite(), -1)
    if len(cases) == 0:
        return top_scores, acting
    reached = F.pad(scores(cases, -1.0), (1, 0), value=-1.0).amax(1)  # [M]
    among = _unit(cases) @ _unit(cases).T
    crowded = crowd(among.masked_fill(among >= SAME_QUESTION, -math.inf))
    threshold = (reached - crowded).sort(descending=True).values[min(int(rate * len(cases)), len(cases) - 1)]
    rivals = _unit(x) @ _unit(cases[reached < SAME_QUESTION]).T  # a case that asks what an edit asks is none
    nearest = F.pad(rivals, (1, 0), value=-math.inf).amax(1)
    own = (top_scores >= SAME_QUESTION) & (top_scores > nearest[:, None])
    acts = (top_scores > (crowd(rivals) + threshold.clamp(min=margin))[:, None]) | own
    return top_scores, acting.where(acts, -1)
