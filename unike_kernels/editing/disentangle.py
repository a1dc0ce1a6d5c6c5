"""Enc_sem and Enc_tru (equations 4 and 5), zeta and W_zeta: what the truthful direction is, learned from triplets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import reference
from ..config import EncoderConfig

Encoder = tuple[tuple[Tensor, Tensor], ...]


@dataclass(repr=False)
class LayerFit:
    """What one layer learned: the encoders, zeta [d] and zeta' = W_zeta zeta [d], and how well on held-out triplets.

    truthfulness_auc: how well the cosine with zeta tells held-out encoded h_pos from h_neg (0.5 is chance).
    semantic_recall: share of held-out anchors whose nearest encoded item is their own; `untrained_*` is the same for
    encoders as initialised. nan where nothing could be held out. held_out: the number of triplets that measured.
    """

    enc_sem: Encoder
    enc_tru: Encoder
    zeta: Tensor
    w_zeta: Tensor
    zeta_prime: Tensor
    truthfulness_auc: float
    semantic_recall: float
    untrained_auc: float
    untrained_recall: float
    held_out: int

    def __repr__(self) -> str:
        return (
            f"LayerFit(truthfulness AUC {self.truthfulness_auc:.3f} (untrained {self.untrained_auc:.3f}), "
            f"semantic recall@1 {self.semantic_recall:.3f} (untrained {self.untrained_recall:.3f}), "
            f"held out {self.held_out})"
        )


class Fits(dict[int, LayerFit]):
    """What `Editor.fit` learned, by layer; prints as a table."""

    def __str__(self) -> str:
        head = ("layer", "truthfulness AUC", "untrained", "semantic recall@1", "untrained", "held out")
        rows = [
            (
                str(layer),
                *(f"{x:.3f}" for x in (f.truthfulness_auc, f.untrained_auc, f.semantic_recall, f.untrained_recall)),
                str(f.held_out),
            )
            for layer, f in sorted(self.items())
        ]
        lines = ["  ".join(cell.rjust(len(h)) for cell, h in zip(row, head, strict=True)) for row in (head, *rows)]
        return "\n".join(lines)


def fit_layer(
    anchors: Tensor,
    items_pos: Tensor,
    items_neg: Tensor,
    h_pos: Tensor,
    h_neg: Tensor,
    groups: Sequence[str],
    config: EncoderConfig,
    *,
    device: torch.device | str = "cpu",
) -> LayerFit:
    """Fits one layer's encoders on N triplets, computing on `device`; the results are on the CPU.

    anchors [N, d]: h_att (or h_sem); items_pos, items_neg [N, d]: what a single item would inject (equation 7's space);
    h_pos, h_neg [N, d]: the states themselves. groups: one name per triplet; whole groups are held out. With its
    answer as a triplet's group the measure cannot come from the identity of words, with one group per triplet it can.
    """
    generator = torch.Generator().manual_seed(config.seed)
    anchors, items_pos, items_neg, h_pos, h_neg = (
        h.to(device, torch.float32) for h in (anchors, items_pos, items_neg, h_pos, h_neg)
    )
    d, act = h_pos.shape[1], config.activation
    train, test = split_groups(groups, config.held_out, generator)
    start_sem, start_tru = (untrained(d, generator, device) for _ in range(2))
    sem = _train(start_sem, config, generator, train, reference.semantic_loss, [anchors], [items_pos, items_neg])
    tru = _train(start_tru, config, generator, train, reference.truthfulness_loss, [], [h_pos, h_neg])
    known_pos, known_neg = (reference.encode(h[train], tru, act) for h in (h_pos, h_neg))
    zeta = reference.zeta(known_pos, known_neg)
    w_zeta = linear_decoder(torch.cat([known_pos, known_neg]), torch.cat([h_pos[train], h_neg[train]]), config.ridge)

    def measured(semantic: Encoder, truthful: Encoder) -> tuple[float, float]:
        encoded = (reference.encode(h[rows], truthful, act) for rows in (train, test) for h in (h_pos, h_neg))
        known_pos, known_neg, new_pos, new_neg = encoded
        items = reference.encode(items_pos[test], semantic, act)
        return (
            truthfulness_auc(new_pos, new_neg, reference.zeta(known_pos, known_neg)),
            semantic_recall(anchors[test], items),
        )

    auc, recall = measured(sem, tru)
    untrained_auc, untrained_recall = measured(start_sem, start_tru)
    return LayerFit(
        _on_cpu(sem),
        _on_cpu(tru),
        zeta.cpu(),
        w_zeta.cpu(),
        (w_zeta @ zeta).cpu(),
        auc,
        recall,
        untrained_auc,
        untrained_recall,
        len(test),
    )


def _on_cpu(encoder: Encoder) -> Encoder:
    return tuple((w.cpu(), b.cpu()) for w, b in encoder)


def untrained(d: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Encoder:
    """Two linear maps [d, d] as initialised: rows of variance 1 / d, zero biases."""
    weights = [torch.randn(d, d, generator=generator, device="cpu", dtype=torch.float32) / d**0.5 for _ in range(2)]
    return tuple((w.to(device), torch.zeros(d, device=device, dtype=torch.float32)) for w in weights)


def split_groups(groups: Sequence[str], held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(train, test) indices: a share `held_out` of the groups goes to test; of two and more at least one, unless 0."""
    names = sorted(set(groups))
    order = [names[i] for i in torch.randperm(len(names), generator=generator, device="cpu").tolist()]
    n = min(max(1, round(held_out * len(order))), len(order) - 1) if order and held_out else 0
    out = set(order[:n])
    test = [i for i, g in enumerate(groups) if g in out]
    train = [i for i, g in enumerate(groups) if g not in out]
    return torch.tensor(train, dtype=torch.long), torch.tensor(test, dtype=torch.long)


def truthfulness_auc(pos: Tensor, neg: Tensor, zeta: Tensor) -> float:
    """P(cos(p, zeta) > cos(n, zeta)) over all pairs of encoded states pos, neg [N, d]; a tie counts half."""
    if len(pos) == 0 or len(neg) == 0:
        return float("nan")
    p, n = (nn.functional.cosine_similarity(z, zeta, dim=-1) for z in (pos, neg))
    wins = (p[:, None] > n[None, :]).double() + 0.5 * (p[:, None] == n[None, :]).double()
    return float(wins.mean())


def semantic_recall(anchors: Tensor, encoded: Tensor) -> float:
    """Share of anchors [N, d] whose nearest encoded item [N, d] (cosine) is their own; nan for none."""
    if len(anchors) == 0:
        return float("nan")
    a, e = nn.functional.normalize(anchors, dim=-1), nn.functional.normalize(encoded, dim=-1)
    own = torch.arange(len(a), device=a.device)
    return float(((a @ e.T).argmax(dim=1) == own).double().mean())


def linear_decoder(encoded: Tensor, states: Tensor, ridge: float) -> Tensor:
    """W_zeta [d, d]: the ridge regression from centred encoded states [M, d] back to the centred states [M, d].

    `ridge` is relative to the mean squared singular value, so it does not depend on the states' scale.
    """
    z = (encoded - encoded.mean(dim=0)).double()
    h = (states - states.mean(dim=0)).double()
    gram = z.T @ z
    scale = gram.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * eye, z.T @ h).T.to(states.dtype)


def _train(
    start: Encoder,
    config: EncoderConfig,
    generator: torch.Generator,
    train: Tensor,
    loss_of: Callable[..., Tensor],
    plain: list[Tensor],
    encoded: list[Tensor],
) -> Encoder:
    """AdamW on mini-batches of the `train` rows: those of `plain`, given to the loss as they are, then `encoded`.

    The learning rate falls to zero along a cosine.
    """
    with torch.enable_grad():
        leaves = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in start]
        optimizer = torch.optim.AdamW([t for pair in leaves for t in pair], config.lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        for _ in range(config.steps):
            rows = train[torch.randperm(len(train), generator=generator, device="cpu")[: config.batch_size]]
            states = [t[rows] for t in plain] + [reference.encode(t[rows], leaves, config.activation) for t in encoded]
            optimizer.zero_grad()
            loss_of(*states, config.temperature).backward()
            optimizer.step()
            schedule.step()
    return tuple((w.detach(), b.detach()) for w, b in leaves)
