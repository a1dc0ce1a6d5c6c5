"""What a case asks, apart from what it is about: learned from training prompts that were asked about several things."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

LEAST = 8  # cases that a prompt needs to tell what it asks from what each of them is about; questions in two wordings
KEPT = 64  # directions among which those of prompts are sought, at most
PER_DIRECTION = 8  # cases for every direction, so that what is found holds for other cases too
SHARE = 0.999  # of the pairs of cases with the same prompt that count as asking the same
PAIRINGS = 16  # of each case with others of its prompt or question, which measure how far apart such cases are


@torch.no_grad()
def asking(states: Tensor, prompts: Sequence[str], questions: Sequence[Hashable]) -> Tensor | None:
    """A [r, d] fp32, such that cases x and y ask the same where |A (x - y)| <= 1; None where prompts do not tell.

    states [M, d]: of M case tokens; prompts: their M prompts, of which those count that `LEAST` cases and more share;
    questions: M times what is asked in whichever words, None where nothing is known of it; at least `LEAST` have to be
    asked in two wordings, or nothing says how far apart wordings are.
    Linear discriminants of the prompts (Fisher 1936, Rao 1948), as many as differ by more between prompts than within
    one (a ratio of variances above 1): a wording that changes little in a state is none of them. Scaled such that
    `SHARE` of the pairs of cases with the same prompt, about whatever they are, are within 1, and of those that ask the
    same question in other words. One half of the cases says where to look, the other what is there: with more features
    than cases, any labels differ somewhere.
    """
    if not len(states) == len(prompts) == len(questions):
        raise ValueError(f"{len(states)} states, but {len(prompts)} prompts and {len(questions)} questions")
    of_prompt = together(prompts)
    worded = [rows for rows in together(questions) if len({prompts[i] for i in rows}) > 1]
    if len(worded) < LEAST:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs', too
        orders = [torch.tensor(rows)[torch.randperm(len(rows))] for rows in of_prompt if len(rows) >= LEAST]
        groups = [states[rows.to(states.device)].double().cpu() for rows in orders]
        kept = min(KEPT, states.shape[1], sum(map(len, groups)) // 2 // PER_DIRECTION)
        if len(groups) < 2 or kept < 2:
            return None
        axes = likely([group[::2] for group in groups], kept)  # [d, kept]
        worded = [[rows[i] for i in torch.randperm(len(rows))] for rows in worded]
    found = [group[1::2] @ axes for group in groups]
    directions = discriminants(found)  # [kept, r]
    if directions.shape[1] == 0:
        return None
    limit = torch.cat([distances(group @ directions) for group in found]).quantile(SHARE)
    reworded = []
    for rows in worded:
        words = [prompts[i] for i in rows]
        code = torch.tensor([words.index(word) for word in words])
        reworded.append(distances(states[rows].double().cpu() @ axes @ directions, code))
    limit = limit.maximum(torch.cat(reworded).quantile(SHARE))
    return None if limit == 0 else (axes @ directions / limit).T.float().contiguous()


def together(names: Iterable[Hashable]) -> list[list[int]]:
    """Of every name but None, where it stands."""
    found: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            found.setdefault(name, []).append(i)
    return list(found.values())


def likely(groups: Sequence[Tensor], kept: int) -> Tensor:
    """[d, at most kept] an orthonormal basis of where the groups [n, d] lie apart, and of where each is widest."""
    means = torch.stack([group.mean(dim=0) for group in groups])
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)[:, None]
    off = (means - (sizes * means).sum(dim=0) / sizes.sum()) * sizes.sqrt()
    around = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    between = torch.linalg.svd(off, full_matrices=False).Vh[: min(kept // 2, len(groups) - 1)]
    _, _, widest = torch.svd_lowrank(around, q=min(kept - len(between), *around.shape), niter=4)
    return torch.linalg.qr(torch.cat([between.T, widest], dim=1)).Q


def discriminants(groups: Sequence[Tensor]) -> Tensor:
    """[k, r] directions, of variance 1 within the groups [n, k] and of more than that between them, largest first."""
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    means = torch.stack([group.mean(dim=0) for group in groups])
    around = torch.cat([group - group.mean(dim=0) for group in groups])
    within = around.T @ around / (sizes.sum() - len(groups))
    values, vectors = torch.linalg.eigh(within)
    some = values > 1e-9 * values[-1:]  # of a direction in which no group varies nothing can be said
    whiten = vectors[:, some] / values[some].sqrt()
    off = (means - (sizes[:, None] * means).sum(dim=0) / sizes.sum()) @ whiten
    between = (off.T * sizes) @ off / sizes.sum()
    ratios, turned = torch.linalg.eigh(between)
    ratios -= (len(groups) - 1) / sizes.sum()  # what means of so many cases differ by without a reason
    return (whiten @ turned[:, ratios > 1]).flip(1)


def distances(cases: Tensor, words: Tensor | None = None) -> Tensor:
    """[pairs] of cases [n, r] with those one to `PAIRINGS` places behind them, of other words [n] where these count."""
    places = range(1, min(PAIRINGS, len(cases) - 1) + 1)
    found = [(cases - cases.roll(n, dims=0)).norm(dim=1) for n in places]
    if words is not None:
        found = [part[words != words.roll(n)] for n, part in zip(places, found, strict=True)]
    return torch.cat(found)
