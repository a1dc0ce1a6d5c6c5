"""Enc_sem and Enc_tru (equations 4 and 5), zeta and W_zeta: what the truthful direction is, learned from triplets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import reference
from ..config import EncoderConfig

Encoder = tuple[tuple[Tensor, Tensor], ...]


@dataclass
class LayerFit:
    """What one layer learned: the encoders, zeta [d] and zeta' = W_zeta zeta [d], and how well on held-out triplets.

    truthfulness_auc: how well the cosine with zeta tells held-out encoded h_pos from h_neg (0.5 is chance).
    semantic_recall: share of held-out anchors whose nearest encoded item is their own; `untrained` is the same for
    encoders as initialised.
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


def untrained(d: int, generator: torch.Generator) -> Encoder:
    """Two linear maps [d, d] as initialised: rows of variance 1 / d, zero biases."""
    return tuple((torch.randn(d, d, generator=generator) / d**0.5, torch.zeros(d)) for _ in range(2))


def fit_layer(
    anchors: Tensor,
    items_pos: Tensor,
    items_neg: Tensor,
    h_pos: Tensor,
    h_neg: Tensor,
    groups: list[str],
    config: EncoderConfig,
) -> LayerFit:
    """Fits one layer's encoders on N triplets.

    anchors [N, d]: h_att (or h_sem); items_pos, items_neg [N, d]: what a single item would inject (equation 7's space);
    h_pos, h_neg [N, d]: the states themselves. groups: one name per triplet (its answer); whole groups are held out,
    because triplets of one answer on both sides would measure word identity.
    """
    generator = torch.Generator().manual_seed(config.seed)
    d = h_pos.shape[1]
    train, test = split_groups(groups, config.held_out, generator)
    start_sem, start_tru = untrained(d, generator), untrained(d, generator)
    sem = _train(start_sem, config, generator, train, _semantic, (anchors, items_pos, items_neg))
    tru = _train(start_tru, config, generator, train, _truthful, (h_pos, h_neg))
    act = config.activation
    z_pos, z_neg = reference.encode(h_pos, tru, act), reference.encode(h_neg, tru, act)
    zeta = reference.zeta(z_pos[train], z_neg[train])
    both, encoded = (
        torch.cat([h_pos, h_neg])[_twice(train, len(h_pos))],
        torch.cat([z_pos, z_neg])[_twice(train, len(h_pos))],
    )
    w_zeta = linear_decoder(encoded, both, config.ridge)
    return LayerFit(
        sem,
        tru,
        zeta,
        w_zeta,
        zeta @ w_zeta.T,
        truthfulness_auc(h_pos[test], h_neg[test], h_pos[train], h_neg[train], tru, act),
        semantic_recall(anchors[test], items_pos[test], sem, act),
        truthfulness_auc(h_pos[test], h_neg[test], h_pos[train], h_neg[train], start_tru, act),
        semantic_recall(anchors[test], items_pos[test], start_sem, act),
    )


def split_groups(groups: list[str], held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(train, test) indices: a share `held_out` of the groups, at least one where there are two, goes to test."""
    names = sorted(set(groups))
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    n = min(max(1, round(held_out * len(order))), len(order) - 1) if len(order) > 1 else 0
    out = set(order[:n])
    test = [i for i, g in enumerate(groups) if g in out]
    train = [i for i, g in enumerate(groups) if g not in out]
    return torch.tensor(train, dtype=torch.long), torch.tensor(test, dtype=torch.long)


def truthfulness_auc(
    pos: Tensor, neg: Tensor, known_pos: Tensor, known_neg: Tensor, encoder: Encoder, act: str
) -> float:
    """P(cos(Enc(h_pos), zeta) > cos(Enc(h_neg), zeta)) over all pairs, zeta taken from the known states."""
    zeta = reference.zeta(reference.encode(known_pos, encoder, act), reference.encode(known_neg, encoder, act))
    p = nn.functional.cosine_similarity(reference.encode(pos, encoder, act), zeta, dim=-1)
    n = nn.functional.cosine_similarity(reference.encode(neg, encoder, act), zeta, dim=-1)
    if len(p) == 0:
        return float("nan")
    wins = (p[:, None] > n[None, :]).double() + 0.5 * (p[:, None] == n[None, :]).double()
    return float(wins.mean())


def semantic_recall(anchors: Tensor, items: Tensor, encoder: Encoder, act: str) -> float:
    """Share of anchors whose nearest encoded item (cosine) is their own."""
    if len(anchors) == 0:
        return float("nan")
    a = nn.functional.normalize(anchors, dim=-1)
    e = nn.functional.normalize(reference.encode(items, encoder, act), dim=-1)
    return float(((a @ e.T).argmax(dim=1) == torch.arange(len(a))).double().mean())


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


def _semantic(encoder: Encoder, act: str, temperature: float, anchors: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    return reference.semantic_loss(
        anchors, reference.encode(pos, encoder, act), reference.encode(neg, encoder, act), temperature
    )


def _truthful(encoder: Encoder, act: str, temperature: float, pos: Tensor, neg: Tensor) -> Tensor:
    return reference.truthfulness_loss(
        reference.encode(pos, encoder, act), reference.encode(neg, encoder, act), temperature
    )


def _train(start, config: EncoderConfig, generator: torch.Generator, train: Tensor, loss_of, data) -> Encoder:
    """Adam on mini-batches of triplets; the learning rate falls to zero along a cosine."""
    leaves = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in start]
    parameters = [t for pair in leaves for t in pair]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        rows = train[torch.randperm(len(train), generator=generator)[: config.batch_size]]
        loss = loss_of(tuple(leaves), config.activation, config.temperature, *(t[rows] for t in data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuple((w.detach(), b.detach()) for w, b in leaves)


def _twice(index: Tensor, n: int) -> Tensor:
    return torch.cat([index, index + n])
