"""Figure 5a's points: right and wrong answers, encoded, in the semantic and in the truthfulness space."""

from dataclasses import replace
from typing import Any

import torch

from unike_kernels import reference
from unike_kernels.editing.disentangle import fit_layer, split_groups, truthfulness_auc
from unike_kernels.editing.editor import Editor

HELD_OUT = 0.3  # of the answers: only their states are shown, the encoders never saw them


def run(editor: Editor, seed: int) -> dict[str, Any]:
    """The points, of the last edited layer, on answers held out of the encoders' fit, as texts "x,y x,y ...".

    auc: how well the direction from wrong to right answers, taken from the fitted triplets in the space itself, tells
    the held-out ones apart: 0.5 is mixed. Neighbours would not tell: the triplets of one answer lie together in both.
    """
    from sklearn.manifold import TSNE

    states = editor.states
    assert states is not None  # the memory is built
    layer, config = editor.layers[-1], replace(editor.config.encoders, held_out=HELD_OUT, held_out_by="answer")
    s = states.layers[layer]
    answers = [" ".join(editor.triplets[i]["target"].lower().split()) for i in states.kept]
    pos, neg = editor.injected(layer, s.h_pos), editor.injected(layer, s.h_neg)
    fit = fit_layer(s.h_att, pos, neg, s.h_pos, s.h_neg, answers, config)
    known, new = split_groups(answers, HELD_OUT, torch.Generator().manual_seed(config.seed))
    out: dict[str, Any] = {}
    for name, encoder, both in (
        ("semantic", fit.enc_sem, (pos, neg)),
        ("truthfulness", fit.enc_tru, (s.h_pos, s.h_neg)),
    ):
        right, wrong = (reference.encode(h.float(), encoder, config.activation) for h in both)
        auc = truthfulness_auc(right[new], wrong[new], reference.zeta(right[known], wrong[known]))
        rows = torch.nn.functional.normalize(torch.cat([right[new], wrong[new]]), dim=-1)  # by cosine, as the losses
        perplexity = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows.numpy())
        texts = [f"{x:.1f},{y:.1f}" for x, y in points]
        out[name] = {"pos": " ".join(texts[: len(new)]), "neg": " ".join(texts[len(new) :]), "auc": auc}
    return {"seed": seed, "layer": layer, "held_out": len(new), "spaces": out}
