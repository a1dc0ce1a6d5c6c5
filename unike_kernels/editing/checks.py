"""Whether a model can take what it is to be asked: told entry by entry, before anything is computed."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from tqdm import tqdm

from ..models import Decoder, learned_positions
from .extract import ANSWER_TOKENS
from .inputs import Collator, Sample


def check_inputs(
    collator: Collator,
    decoder: Decoder,
    samples: Sequence[Sample],
    name: Callable[[int], str],
    *,
    eos: bool = False,
    answered: Collection[int] = (),
    beyond: int = 1,
    least: int = 1,
    again: bool = False,
    progress: bool = False,
) -> None:
    """ValueError or OSError, in the name of the sample, where one cannot be read, tokenised or held by the model.

    name: of sample n, for the message. eos: whether targets end with the end-of-sequence token. answered: which samples
    are answered freely too, with `beyond` tokens more than the longest target has, and `least` at the least. again:
    whether the model reads those answers afterwards, to their last token.
    Every picture's file is decoded, once, but not made into the model's input: for photographs of 640 x 480 that is 0.7
    instead of 7.6 ms each on one core (BLIP's processor, transformers 5.24), and a header, 0.03 ms, tells too little.
    How many tokens a picture takes is seen from the first one of these samples.
    """
    most = learned_positions(collator.model, decoder)
    taken: int | None = None  # by a picture, beyond what its prompt takes alone
    prompts, targets = [], []
    for n, sample in enumerate(tqdm(samples, desc="inputs", leave=False, disable=not progress)):
        try:
            collator.check(sample)
            length = collator.text_length(sample.prompt)
            if sample.image is not None:
                if taken is None or not collator.uniform(sample):
                    whole = collator.prompt_length(sample)
                    taken = whole - length if taken is None else taken
                    length = whole
                else:
                    length += taken
            elif length == 0:
                raise ValueError(f"prompt {sample.prompt!r} has no token, so it has no case token")
            target = 0 if sample.target is None else len(collator.target_ids(sample.prompt, sample.target))
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{name(n)}: {error}") from None
        prompts.append(length)
        targets.append(target)
    if most is None:
        return
    end = int(eos and collator.eos is not None)
    new = max(least, max(targets, default=0) + beyond)
    for n, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if (length := prompt + (target + end if target else 0)) > most:
            raise ValueError(f"{name(n)} is {length} tokens long, but the model has positions for {most}")
        if n in answered and prompt + new - (not again) > most:  # the last token of an answer takes no place
            raise ValueError(
                f"{name(n)} is {prompt} tokens long and may be answered with {new}, but the model has positions for "
                f"{most}"
            )


def check_triplets(
    collator: Collator, decoder: Decoder, triplets: Sequence[dict[str, Any]], *, progress: bool = False
) -> None:
    """`check_inputs` of triplets (dicts, as `Editor.build_memory` takes them) and of the predictions they bring."""
    right = [Sample(t["prompt"], t["target"], t.get("image")) for t in triplets]
    given = {n: str(t["prediction"]).strip() for n, t in enumerate(triplets) if str(t.get("prediction") or "").strip()}
    asked = {n for n in range(len(right)) if n not in given}
    names = [f"triplet {n}" for n in range(len(right))]
    free: dict[str, Any] = {"answered": asked, "beyond": 0, "least": ANSWER_TOKENS, "again": True}
    check_inputs(collator, decoder, right, names.__getitem__, **free, progress=progress)
    wrong = [Sample(right[n].prompt, answer, right[n].image) for n, answer in given.items()]
    names = [f"the prediction of triplet {n}" for n in given]
    check_inputs(collator, decoder, wrong, names.__getitem__)


def check_probe_inputs(collator: Collator, decoder: Decoder, probes: Sequence[Sample]) -> None:
    """`check_inputs` of probes, which are all answered freely."""
    check_inputs(collator, decoder, probes, lambda n: f"probe {n}", answered=range(len(probes)))
