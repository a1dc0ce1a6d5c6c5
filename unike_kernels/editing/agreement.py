"""Whether states and logits, as editing takes them from a model, are what the model itself would say: asked once."""

import torch
from torch import Tensor

from ..models import Decoder
from .inputs import Batch, Collator, Sample
from .prefix import logits_step, run_prefix, run_tail


@torch.no_grad()
def check_agreement(collator: Collator, decoder: Decoder, first: int, sample: Sample) -> None:
    """ValueError where a model would be edited by logits that are not its own, told on one sample with a target.

    Two things must hold. What the prompt's last token says does not depend on the answer behind it: else the model is
    asked in a way in which it reads the answer. And the layers from `first` on with the head, run alone, give the
    model's own logits: else something lies between that this package does not know.
    """
    kind = type(collator.model).__name__
    whole = collator.batch([sample], [0])
    alone = collator.batch([Sample(sample.prompt, None, sample.image)], [0])
    theirs = _logits(whole)
    told, asked = theirs[int(whole.case_position[0])], _logits(alone)[int(alone.case_position[0])]
    if _differ(told, asked):
        raise ValueError(
            f"{kind} says something else to a prompt when the answer stands behind it (logits {_apart(told, asked)} at "
            "its last token): it sees the answer, so edits cannot be trained or checked on it"
        )
    prefix = run_prefix(collator.model, decoder, whole, first)
    at = whole.target_mask[0].nonzero()[:, 0] - 1
    ours = logits_step(collator.model, decoder)(run_tail(collator.model, decoder, prefix))[0, at]
    if _differ(ours, theirs[at]):
        raise ValueError(
            f"the layers of {kind} from {first} on and its head give other logits than the model itself "
            f"({_apart(ours, theirs[at])}): it does something behind its decoder that this package does not know, so "
            "edits would be trained towards what it does not say"
        )


def _logits(batch: Batch) -> Tensor:
    """[S, V] the model's own."""
    return batch.model(**batch.inputs, use_cache=False).logits[0]


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two of the same logits are further apart than by rounding: 1 % of their range (TF32), in half 5 %."""
    share = 0.05 if torch.finfo(b.dtype).bits <= 16 else 0.01
    return bool((a.float() - b.float()).abs().max() > share * (b.float().max() - b.float().min()))


def _apart(a: Tensor, b: Tensor) -> str:
    return f"up to {float((a.float() - b.float()).abs().max()):.3g} apart"
