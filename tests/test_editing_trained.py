"""The editor on the trained emoji model: what the fit must reach, and edits that hold beyond their own question."""

import warnings

import pytest
import torch

import unike_kernels as uk
from bench.quality import world
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from bench.quality.encoders import Splits, held_out
from unike_kernels.config import RoutingConfig, UnikeConfig
from unike_kernels.editing.extract import tap_rows
from unike_kernels.editing.inputs import Sample

EDITS = 8


@pytest.fixture(scope="module")
def editor():
    """A memory of one triplet for each of 260 drawings, and the encoders fitted on it."""
    model, processor = emoji.load(0)
    made = uk.Editor(model, processor, UnikeConfig(routing=RoutingConfig(mode="routed")))
    made.build_memory(world.triplets(260), progress=False)
    made.fit()
    made.calibrate(world.calibration(400))
    return made


@pytest.fixture(scope="module")
def edited(editor):
    """(records, their edits, one probe of every kind for each)."""
    items = records.records("development", "name", EDITS)
    probes = []
    for r in items:
        picture = world.picture(r["image"])
        probes += [
            {"kind": "rel", "prompt": r["src"], "target": r["alt"], "image": picture},
            {"kind": "t_gen", "prompt": r["rephrase"], "target": r["alt"], "image": picture},
            {"kind": "m_gen", "prompt": r["src"], "target": r["alt"], "image": world.picture(r["image_rephrase"])},
            {"kind": "t_loc", "prompt": r["loc"], "target": r["loc_ans"]},
            {"kind": "m_loc", "prompt": r["m_loc_q"], "target": r["m_loc_a"], "image": world.picture(r["m_loc"])},
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no edit misses its target, and none is in the memory
        return items, editor.edit([world.request(r) for r in items], progress=False), probes


def test_encoders_tell_truth_and_meaning_on_held_out_triplets(editor):
    """Whole concepts are held out: neither their names nor their drawings were seen."""
    for layer, fit in editor.fits.items():
        assert fit.held_out >= 20
        assert fit.truthfulness_auc >= 0.9 and fit.truthfulness_auc > fit.untrained_auc + 0.03, layer
        assert fit.semantic_recall >= 0.3 and fit.semantic_recall > 5 * fit.untrained_recall, layer


@pytest.mark.parametrize("seed", (0, 1))
def test_encoders_tell_truth_and_meaning_on_triplets_held_out_one_by_one(seed, editor):
    """Of both base models; a held-out triplet's concept may be known from other drawings."""
    made = editor
    if seed:
        made = uk.Editor(*emoji.load(seed), editor.config)
        made.build_memory(world.triplets(260), progress=False)
    fits, config = dict(made.fits), made.config
    found = held_out(made, Splits("triplet", 0.2, 1))
    assert sorted(found) == [str(layer) for layer in made.layers]
    for layer, (fit,) in found.items():
        assert fit["truthfulness_auc"] >= 0.9 and fit["truthfulness_auc"] > fit["untrained_auc"] + 0.03, layer
        assert fit["semantic_recall"] >= 0.15 and fit["semantic_recall"] > 5 * fit["untrained_recall"], layer
    assert made.config == config and dict(made.fits) == fits  # the editor is as it was


def test_edits_generalise_and_stay_local(editor, edited):
    items, edits, probes = edited
    report = editor.check(edits, probes)
    assert report.before["rel"] < 20.0  # the names were never taught
    assert report.metrics["rel"] == report.exact["rel"] == 100.0
    assert report.metrics["t_gen"] >= 90.0 and report.metrics["m_gen"] >= 60.0
    assert report.metrics["t_loc"] >= 99.0 and report.metrics["m_loc"] >= 85.0
    assert len(report.rows) == 5 * len(items)


def test_one_routed_edit_is_as_reliable_as_one_that_always_acts(editor, edited):
    items, edits, probes = edited
    for e in (0, 3):
        one = edits.select([items[e]["id"]])
        rel = [editor.check(one, [probes[5 * e]], routing=routing).metrics["rel"] for routing in ("routed", "always")]
        assert rel == [100.0, 100.0]


@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_of_unequal_length_are_generated_as_the_processor_pads_them(editor, edited, beams, capfd):
    """BLIP-2's processor puts the picture's tokens before the padding, and positions go back to 1 within the row."""
    items, edits, _ = edited
    processor, options = editor.collator.processor, {"max_new_tokens": 8, "num_beams": beams}
    asked = [(r["image"], r["rephrase" if i % 2 else "src"]) for i, r in enumerate(items)]
    asked = [{"images": world.picture(image), "text": text} for image, text in asked]
    inputs = processor(
        images=[a["images"] for a in asked], text=[a["text"] for a in asked], return_tensors="pt", padding=True
    )
    held = inputs["attention_mask"]
    assert bool((held.diff(dim=1) < 0).any())  # padding that is not at the start

    def answers(inputs):
        return [t.split("Answer:")[1].strip() for t in processor.batch_decode(
            editor.model.generate(**inputs, **options), skip_special_tokens=True)]  # fmt: skip

    with uk.patch(editor.model, edits):
        capfd.readouterr()
        together = answers(inputs)
        assert "deprecated" not in capfd.readouterr().err
        alone = [answers(processor(**a, return_tensors="pt"))[0] for a in asked]
    assert together == alone
    assert together[::2] == [r["alt"] for r in items[::2]]  # the edits' own questions


def test_removing_an_edit_restores_the_base_exactly(editor, edited):
    items, edits, _ = edited
    asked = [Sample(r["src"], None, world.picture(r["image"])) for r in items]
    batch = editor.collator.batch(asked, list(range(EDITS)))

    def logits(which=None):
        with torch.no_grad():
            if which is None:
                return editor.model(**batch.inputs).logits
            with uk.patch(editor.model, which):
                return editor.model(**batch.inputs).logits

    base, gone = logits(), logits(edits.remove(items[2]["id"]))
    assert not torch.equal(logits(edits)[2], base[2])
    assert torch.equal(gone[2], base[2]) and torch.equal(logits(), base)


def test_another_question_about_an_edits_picture_is_told_apart(editor, edited):
    """By two directions, learned of training prompts alone: this world asks for names, captions, groups and kinds."""
    items, edits, _ = edited
    assert edits.calibration.asking is None  # of each drawing it has one triplet: nothing says what is reworded
    made = uk.Editor(editor.model, editor.collator.processor, editor.config)
    made.build_memory([t | {"prediction": "wrong"} for t in world.triplets()[:240]], progress=False)  # four of each
    made.fit(progress=False)
    made.calibrate(world.calibration(400), progress=False)
    asks = made.edit([world.request(items[0])], progress=False).calibration.asking
    assert len(asks) == 2
    asked = {"own": [], "same": [], "other": []}
    for r in items:
        picture, other = world.picture(r["image"]), world.picture(r["image_rephrase"])
        questions = [(p["prompt"], p["image"]) for p in r["m_loc_parts"] if p["part"] == "same_picture"]
        asked["own"] += [Sample(r["src"], None, picture)] * 2
        asked["same"] += [Sample(r["rephrase"], None, picture), Sample(r["src"], None, other)]
        asked["other"] += [Sample(prompt, None, world.picture(image)) for prompt, image in questions]
    states = {}
    for name, samples in asked.items():
        states[name] = torch.zeros(len(samples), asks.shape[1])
        for batch in editor.collator.batches(samples, 64):
            (case,) = tap_rows(editor.model, editor.decoder, editor.layers[:1], batch, [batch.case_rows()])
            states[name][batch.rows] = case["tap"][editor.layers[0]].float()
    same, other = (((states[name] - states["own"]) @ asks.T).norm(dim=1) for name in ("same", "other"))
    assert float((same <= 1).float().mean()) >= 0.95 and float((other <= 1).float().mean()) <= 0.2
