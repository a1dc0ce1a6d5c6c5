"""Figure 5a's points: right and wrong answers, encoded, in the semantic and in the truthfulness space."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unike_kernels import reference
from unike_kernels.editing.disentangle import fit_layer, split_groups
from unike_kernels.editing.editor import Editor

HELD_OUT = 0.3  # of the answers: only their states are shown, the encoders never saw them


def run(editor: Editor, seed: int) -> dict[str, Any]:
    """The points, of the last edited layer, on answers held out of the encoders' fit.

    same_kind: how often the five nearest neighbours in the space itself, not on the plane, are of the same kind.
    """
    from sklearn.manifold import TSNE

    states = editor.states
    assert states is not None  # the memory is built
    layer, config = editor.layers[-1], editor.config.encoders
    s = states.layers[layer]
    answers = [" ".join(editor.triplets[i]["target"].lower().split()) for i in states.kept]
    pos, neg = editor.injected(layer, s.h_pos), editor.injected(layer, s.h_neg)
    config = replace(config, held_out=HELD_OUT, held_out_by="answer")
    fit = fit_layer(s.h_att, pos, neg, s.h_pos, s.h_neg, answers, config)
    _, test = split_groups(answers, HELD_OUT, torch.Generator().manual_seed(config.seed))
    encoded = {
        "semantic": [reference.encode(h[test].float(), fit.enc_sem, config.activation) for h in (pos, neg)],
        "truthfulness": [reference.encode(h[test].float(), fit.enc_tru, config.activation) for h in (s.h_pos, s.h_neg)],
    }
    out: dict[str, Any] = {}
    for name, both in encoded.items():
        rows = torch.nn.functional.normalize(torch.cat(both), dim=-1)  # as the losses compare: by cosine
        perplexity = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows.numpy())
        rounded = [[round(float(x), 1) for x in p] for p in points]
        n = len(test)
        out[name] = {"pos": rounded[:n], "neg": rounded[n:], "same_kind": same_kind(rows, n)}
    return {"seed": seed, "layer": layer, "held_out": len(test), "spaces": out}


def same_kind(rows: Tensor, n: int, neighbours: int = 5) -> float:
    """Share of the nearest neighbours that are of a row's own kind; rows [2n, d] units, the first n one kind."""
    likeness = rows @ rows.T
    likeness.fill_diagonal_(-torch.inf)
    near = likeness.topk(min(neighbours, len(rows) - 1), dim=1).indices
    kind = torch.arange(len(rows)) < n
    return float((kind[near] == kind[:, None]).double().mean())
