"""Scores from the edited layers alone are those of full forwards, probe by probe."""

import math

import pytest
import torch

import unike_kernels as uk
from tests.editing_tiny import TARGETS, ask, make_processor, make_requests
from tests.models_tiny import ALWAYS, ROUTED, case_taps, edits_for, make_model
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation.scoring import Score, Scorer
from unike_kernels.models import find_decoder

NAMES = ("opt", "llama", "blip2", "llava")
FIRST = 1  # the first of the last four of five layers


def make_samples(name):
    """Nine probes of different lengths, two of them without a picture, about the pictures of three edits."""
    asked = [ask(name, "what is this ? answer :" + " a" * (i % 4), None if i in (2, 5) else i % 4) for i in range(9)]
    return [Sample(a["prompt"], TARGETS[i % len(TARGETS)], a["image"]) for i, a in enumerate(asked)]


def make_scorer(name, model=None, samples=None, batch_size=4):
    model = model or make_model(name)
    collator = Collator(model, make_processor(name))
    return Scorer(collator, find_decoder(model), FIRST, samples or make_samples(name), batch_size=batch_size)


def edits_of(scorer, name, config):
    """Edits whose questions are three of the probes."""
    requests = make_requests(name, 3)
    samples = [Sample(r["prompt"], None, r["image"]) for r in requests]
    return edits_for(scorer.collator.model, config, prompts=scorer.collator.batch(samples, [0, 1, 2]).inputs)


@torch.no_grad()
def slowly(scorer, handle=None, chosen=None):
    """(logits [S, V], input ids [S], target mask [S]) of every probe alone, by the whole model."""
    out = []
    for i, sample in enumerate(scorer.samples):
        batch = scorer.collator.batch([sample], [0], eos=False)
        ids, mask = batch.inputs["input_ids"][0], batch.target_mask[0]
        if handle is None:
            logits = batch.model(**batch.inputs).logits
        else:
            handle.set_cases(batch.token_to_case(), batch.case_rows())
            if chosen is None:
                logits = batch.model(**batch.inputs).logits
            else:
                edit = None if chosen[i] is None else handle.edits.ids[chosen[i]]
                with handle.choosing([edit]):
                    logits = batch.model(**batch.inputs).logits
            handle.set_cases()
        out.append((logits[0], ids, mask))
    return out


def by_hand(sample, before, after):
    """One probe's Score, from the definitions."""
    (base, ids, mask), (edited, _, _) = before, after
    targets = mask.nonzero()[:, 0].tolist()
    said = [int(edited[t - 1].argmax()) for t in targets]
    said_before = [int(base[t - 1].argmax()) for t in targets]
    ranks = 1 if sample.image is None else 10
    pairs = zip(base.topk(ranks).indices.flatten().tolist(), edited.topk(ranks).indices.flatten().tolist(), strict=True)
    same = [a == b for a, b in pairs]
    return Score(
        sum(a == int(ids[t]) for a, t in zip(said, targets, strict=True)) / len(targets),
        sum(a == b for a, b in zip(said, said_before, strict=True)) / len(targets),
        sum(same) / len(same),
    )


def assert_scores(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert (a.accuracy, a.locality_a) == pytest.approx((b.accuracy, b.locality_a))
        assert a.locality_b == pytest.approx(b.locality_b, abs=0.02)  # a rank may flip between equal logits


@pytest.mark.parametrize(
    ("config", "chosen"),
    [(ALWAYS, None), (ROUTED, None), (ALWAYS, [0, None, 1, 2, 0, 1, None, 2, 0])],
    ids=["always", "routed", "chosen"],
)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_full_forwards(name, config, chosen):
    scorer = make_scorer(name)
    base = slowly(scorer)
    with uk.patch(scorer.collator.model, edits_of(scorer, name, config)) as handle:
        found = scorer.score(handle, chosen)
        wanted = [
            by_hand(s, b, a) for s, b, a in zip(scorer.samples, base, slowly(scorer, handle, chosen), strict=True)
        ]
        assert scorer.score(handle, chosen) == found  # nothing is kept between passes
    assert_scores(found, wanted)
    assert any(s.locality_a < 1 for s in found) and any(s.locality_b < 1 for s in found)
    if chosen is not None:
        assert all(found[i] == Score(scorer.base_accuracy()[i], 1.0, 1.0, 0.0) for i in (1, 6))


@pytest.mark.parametrize("name", NAMES)
def test_base(name):
    """What the unedited model says; and no edits is no change."""
    samples = make_samples(name)
    scorer = make_scorer(name, samples=samples)
    base = slowly(scorer)
    right = [by_hand(s, b, b).accuracy for s, b in zip(samples, base, strict=True)]
    assert scorer.base_accuracy() == pytest.approx(right)
    for i, (logits, ids, mask) in enumerate(base):
        at = mask.nonzero()[:, 0]
        assert torch.equal(scorer.base[i].target, logits[at - 1].argmax(-1))
        assert torch.equal(scorer.base[i].wanted, ids[at])
        asked = scorer.collator.batch([Sample(samples[i].prompt, None, samples[i].image)], [0])
        torch.testing.assert_close(scorer.case_tap[i], case_taps(asked.model, asked.inputs, [FIRST])[FIRST][0])
    with uk.patch(scorer.collator.model, edits_of(scorer, name, ALWAYS)) as handle, handle.disabled():
        assert {(s.locality_a, s.locality_b) for s in scorer.score(handle)} == {(1.0, 1.0)}


def test_scores_do_not_depend_on_the_batch():
    """Padded rows score as alone: locality B leaves padding out."""
    one, all_ = make_scorer("llama", batch_size=1), make_scorer("llama", batch_size=9)
    edits = edits_of(one, "llama", ROUTED)
    found = []
    for scorer in (one, all_):
        with uk.patch(scorer.collator.model, edits) as handle:
            found.append(scorer.score(handle))
    assert_scores(*found)


@pytest.mark.parametrize("config", [ALWAYS, ROUTED], ids=["always", "routed"])
def test_the_last_prompt_token_decides_not_the_answer(config):
    """Other targets, same routing, same items, same alpha: evaluation must not leak the answer."""
    alphas, model = [], make_model("llama")
    for answer in ("red dog", "moon of the old house"):
        samples = [Sample(s.prompt, answer, s.image) for s in make_samples("llama")]
        scorer = make_scorer("llama", model, samples)
        with uk.patch(model, edits_of(scorer, "llama", config)) as handle:
            alphas.append([s.alpha for s in scorer.score(handle)])
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-5) and len({round(a, 4) for a in alphas[0]}) > 1


def test_alphas_are_the_mean_over_layers():
    scorer = make_scorer("opt")
    chosen = [None, *[1] * 8]
    with uk.patch(scorer.collator.model, edits_of(scorer, "opt", ALWAYS)) as handle:
        found = [s.alpha for s in scorer.score(handle, chosen)]
        assert found[0] == 0.0
        for sample, alpha in zip(scorer.samples[1:4], found[1:4], strict=True):
            inputs = scorer.collator.batch([Sample(sample.prompt)], [0]).inputs
            with handle.choosing([handle.edits.ids[1]]):
                (report,) = handle.explain(**inputs)
            assert alpha == pytest.approx(sum(layer.alpha for layer in report.layers) / 4, abs=1e-5)
    without = edits_of(scorer, "opt", uk.UnikeConfig(shift=uk.ShiftConfig(enabled=False)))
    with uk.patch(scorer.collator.model, without) as handle:
        assert all(math.isnan(s.alpha) for s in scorer.score(handle))


def test_logits_with_and_without_a_patch():
    scorer = make_scorer("blip2")
    base = scorer.logits()
    with uk.patch(scorer.collator.model, edits_of(scorer, "blip2", ALWAYS)) as handle:
        edited = scorer.logits(handle)
    assert all(torch.equal(a, b) for a, b in zip(base, scorer.logits(), strict=True))
    for (batch, _), a, b in zip(scorer.batches, base, edited, strict=True):
        assert a.shape[:2] == batch.shape and (a - b).abs().max() > 1e-2


def test_what_cannot_be_scored_is_refused():
    scorer = make_scorer("opt")
    model = scorer.collator.model
    edits = edits_of(scorer, "opt", ALWAYS)
    with uk.patch(model, edits) as handle:
        with pytest.raises(ValueError, match=r"carries edits \(default\)"):
            make_scorer("opt", model)
        with handle.disabled():
            make_scorer("opt", model)
        with pytest.raises(ValueError, match="9 probes, but edits are chosen for 2"):
            scorer.score(handle, [0, 1])
    high = Scorer(scorer.collator, scorer.decoder, 3, scorer.samples)
    with uk.patch(model, edits) as handle, pytest.raises(ValueError, match="edits layer 1, but this Scorer"):
        high.score(handle)
