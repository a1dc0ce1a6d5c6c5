"""MMEdit's metrics by name (spec, section 4), on token ids; every definition in circulation is a function."""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_ids(logits: Tensor, target_mask: Tensor) -> list[Tensor]:
    """tf_ids: the teacher-forced argmax at each row's target positions, shifted by one.

    logits [B, S, V]; target_mask [B, S] bool, True at the target tokens. Returns B int64 tensors. ValueError for a
    target token at position 0, which nothing predicts.
    """
    if bool(target_mask[:, 0].any()):
        raise ValueError("a target token stands at position 0: nothing before it predicts it")
    best = logits[:, :-1].argmax(dim=-1)
    return [row[mask] for row, mask in zip(best, target_mask[:, 1:], strict=True)]


def token_accuracy(predicted: Tensor, target: Tensor) -> float:
    """Share of target tokens predicted: Rel, T-Gen and M-Gen are its mean over samples. Both [n] int64, n >= 1."""
    _same_length(predicted, target)
    return float((predicted == target).double().mean())


def locality_a(before: Tensor, after: Tensor) -> float:
    """Locality A: share of target positions whose top-1 is as before the edit. Both [n] int64, n >= 1."""
    _same_length(before, after)
    return float((before == after).double().mean())


def locality_b(before: Tensor, after: Tensor) -> float:
    """Locality B (the trained baselines' evaluator): rank-by-rank equality of the ordered top-k at *all* positions.

    before, after: [S, k] int64, k = 1 for text and 10 for pictures; image prefix, prompt and target all count.
    """
    if before.shape != after.shape:
        raise ValueError(f"before is {tuple(before.shape)}, but after is {tuple(after.shape)}")
    return float((before == after).double().mean())


def exact_match(generated: str, target: str) -> bool:
    """Whether a greedily generated answer is the target, apart from surrounding white space."""
    return generated.strip() == target.strip()


def mean_of_five(rel: float, t_gen: float, m_gen: float, t_loc: float, m_loc: float) -> float:
    """The mean of the five metrics, with locality A."""
    return (rel + t_gen + m_gen + t_loc + m_loc) / 5


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of the mean of `values`, clustered: samples of one cluster (concept) count as dependent.

    Liang-Zeger with the small-sample factor G / (G - 1) of G clusters; nan for fewer than two clusters.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, but {len(clusters)} clusters")
    mean = sum(values) / max(1, len(values))
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    g = len(sums)
    if g < 2:
        return float("nan")
    return (sum(s * s for s in sums.values()) * g / (g - 1)) ** 0.5 / len(values)


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` when whole clusters are drawn again, with replacement.

    (nan, nan) for fewer than two clusters.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values, but {len(clusters)} clusters")
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    g = len(index)
    if g < 2:
        return float("nan"), float("nan")
    at = torch.tensor([index[name] for name in clusters])
    sums = torch.zeros(g, dtype=torch.float64).index_add(0, at, torch.tensor(values, dtype=torch.float64))
    sizes = torch.bincount(at, minlength=g).double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(draws):
        drawn = torch.randint(g, (g,), generator=generator, device="cpu")
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    tail = (1 - level) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def top_ids(logits: Tensor, k: int) -> Tensor:
    """[..., k] int64: the ids of the k largest logits, largest first; all of them where there are fewer than k."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def _same_length(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"token ids must be of one length, at least 1, but are {tuple(a.shape)} and {tuple(b.shape)}")
