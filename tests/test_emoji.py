"""The emoji benchmark: its splits and records, and what the shipped base models know, do not know and look at."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from bench.quality import world
from bench.quality.emoji import data, evaluate, records, train
from bench.quality.emoji import model as tiny
from bench.quality.emoji.language import LanguageStage, cache_features
from bench.quality.emoji.vision import VisionStage, normalise, read_drawings

CHANCE = 0.02  # bound on exact match at chance: guessing among 330 names gives 0.003; 0.02 is 5 right of 250


@pytest.fixture(scope="module", params=(0, 1), ids=("seed0", "seed1"))
def base(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return tiny.load(request.param)


def sample(cases: list[evaluate.Case], n: int) -> list[evaluate.Case]:
    return random.Random(7).sample(cases, n)


# --- data -------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_stratified_and_named_unambiguously() -> None:
    splits = data.splits()
    ids = [concept.id for members in splits.values() for concept in members]
    assert len(ids) == len(set(ids)) == len(data.concepts()) >= 300
    assert {split: len(members) for split, members in splits.items()} == data.SPLITS
    assert len(splits["reported"]) >= 120
    assert len({concept.name for concept in data.concepts()}) == len(ids)
    share = len(splits["reported"]) / len(ids)
    for kind in {concept.kind for concept in data.concepts()}:
        members = [concept for concept in data.concepts() if concept.kind == kind]
        assert abs(sum(c in splits["reported"] for c in members) - share * len(members)) <= 2


def test_held_out_names_are_never_taught_from_a_picture() -> None:
    for concept in data.concepts():
        targets = [target for _, target in data.picture_questions(concept)]
        known = data.split_of()[concept.id] == "known"
        assert (concept.caption in targets) == known
        assert (concept.name in targets) == (known or concept.name in (concept.kind, concept.group))


@pytest.mark.parametrize("task", records.TASKS)
@pytest.mark.parametrize("split", ("development", "reported"))
def test_records_are_well_formed(split: str, task: str) -> None:
    edited = {concept.id for concept in records.edited(split, task)}
    found = records.records(split, task, n=len(edited), seed=3)
    assert found == records.records(split, task, n=len(edited), seed=3)
    assert found != records.records(split, task, n=len(edited), seed=4)
    by_id = {concept.id: concept for concept in data.concepts()}
    assert {record["concept"] for record in found} == edited
    assert len({record["id"] for record in found}) == len(found)
    reserved = {c.id for c in data.splits()["triplets"] + records.known_roles()["calibration"]}
    for record in found:
        concept = by_id[record["concept"]]
        assert concept.id in edited and concept.id not in reserved
        prompts = {record["src"], *record["rephrases"]}
        assert len(prompts) == (3 if task == "caption" else 6) and record["rephrase"] in record["rephrases"]
        pictures = {record["image"], *record["image_rephrases"]}
        assert pictures == {concept.image(artist) for artist in concept.artists}
        assert record["image_rephrase"] in record["image_rephrases"]
        assert record["image"] not in record["image_rephrases"]
        assert (record["alt"] == concept.name) == (task == "name")
        assert all(record[key] == record[key].strip() for key in ("src", "alt", "loc_ans", "m_loc_a"))
        parts = [part["part"] for part in record["m_loc_parts"]]
        assert sorted(parts) == sorted(2 * ["other_concept", "same_subgroup", "same_picture", "other_question"])
        for part in record["m_loc_parts"]:
            shown = part["image"].split("/")[1].removesuffix(".png")
            assert (shown == concept.id) == (part["part"] == "same_picture")
            assert shown == concept.id or shown not in edited | reserved
            assert part["part"].startswith("same") or data.split_of()[shown] == "known"
            assert (data.DRAWINGS / part["image"]).is_file()
        own = [part for part in record["t_loc"] if part["part"] == "own"]
        assert own and all(concept.name in part["prompt"] for part in own)
        assert all((data.DRAWINGS / image).is_file() for image in pictures)


@pytest.mark.parametrize(
    ("split", "task", "n"),
    [
        ("reported", "name", 1000),
        ("reported", "caption", 1000),
        ("reported", "rename", 400),
        ("development", "name", 150),
    ],
)
def test_many_edits_agree_and_leave_their_probes_to_be_asked(split: str, task: str, n: int) -> None:
    """A thousand edits on one model: no contradiction, and what tests generality is never edited itself."""
    found = records.records(split, task, n)
    assert len(found) == n and len({r["id"] for r in found}) == n
    assert len({(r["concept"], r["alt"]) for r in found}) == len({r["concept"] for r in found})
    asked = {(r["image"], r["src"]) for r in found}
    assert len(asked) == n
    shown = {r["image"] for r in found}
    for r in found:
        assert r["rephrases"] and r["image_rephrases"]
        assert not any((r["image"], prompt) in asked for prompt in r["rephrases"])
        assert shown.isdisjoint(r["image_rephrases"])
    if task != "caption":  # as even as can be: captions have so few openings that drawings of two artists run out
        counts = Counter(r["concept"] for r in found).values()
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("task", records.TASKS)
def test_records_for_the_protocols_hold_every_probe(task: str) -> None:
    items, found = records.records("development", task, 20), world.edits("development", task, 20)
    for item, record in zip(items, found, strict=True):
        assert (record.id, record.task, record.cluster) == (item["id"], task, item["concept"])
        assert (record.request.prompt, record.request.target) == (item["src"], item["alt"])
        assert record.request == record.probes[0].sample
        count = Counter((p.kind, p.part) for p in record.probes)
        assert count["rel", ""] == 1 and count["t_gen", ""] == len(item["rephrases"])
        assert count["m_gen", ""] == len(item["image_rephrases"])
        assert count["t_loc", "own"] == count["m_loc", "same_picture"] == records.PER_PART
        assert all((p.sample.image is None) == (p.kind == "t_loc") for p in record.probes)
    flat = [(p.edit, p.kind, p.part, p.sample) for p in world.probes(items)]
    assert flat == [(i, p.kind, p.part, p.sample) for i, r in enumerate(found) for p in r.probes]


def test_the_first_edit_of_a_concept_does_not_depend_on_how_many_there_are() -> None:
    first, more = records.records("reported", "name", 300), records.records("reported", "name", 340)
    assert first == more[:300]


def test_more_edits_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match=r"188 edits \(caption, development\) do not meet .* but 200 are asked for"):
        records.records("development", "caption", 200)


def test_memory_and_calibration_share_no_concept_with_edits() -> None:
    used = {row["concept"] for row in records.triplets()}
    cases = records.calibration_prompts(None)
    assert len(records.triplets()) >= 1000 and len(cases) == len(set(cases))
    used |= {image.split("/")[1].removesuffix(".png") for image, _ in cases if image is not None}
    for split in ("development", "reported"):
        for task in records.TASKS:
            assert used.isdisjoint(concept.id for concept in records.edited(split, task))


# --- what the base models know ----------------------------------------------------------------------------------------


def test_shipped_weights_are_small() -> None:
    assert sum(tiny.weights_file(seed).stat().st_size for seed in (0, 1)) <= 12 * 2**20


def test_names_of_known_drawings_in_any_phrasing(base: tuple[Any, Any]) -> None:
    assert evaluate.exact(*base, sample(evaluate.naming("known"), 400)).float().mean() >= 0.85


def test_text_only_facts(base: tuple[Any, Any]) -> None:
    facts: list[evaluate.Case] = [(None, *pair) for concept in data.concepts() for pair in data.facts(concept)]
    assert evaluate.exact(*base, sample(facts, 400)).float().mean() >= 0.98


def test_held_out_names_are_unknown(base: tuple[Any, Any]) -> None:
    for split in ("triplets", "development", "reported"):
        assert evaluate.exact(*base, sample(evaluate.naming(split), 150)).float().mean() == 0


def test_naming_falls_to_chance_without_the_right_picture(base: tuple[Any, Any]) -> None:
    cases = sample(evaluate.naming("known"), 250)
    pixels = evaluate.read_pixels([str(image) for image, _, _ in cases], base[1])
    assert evaluate.exact(*base, cases, torch.ones_like(pixels)).float().mean() <= CHANCE
    assert evaluate.exact(*base, cases, pixels.flip(0)).float().mean() <= CHANCE
    swapped = [(image, prompt, other[2]) for (image, prompt, _), other in zip(cases, reversed(cases), strict=True)]
    assert evaluate.exact(*base, swapped, pixels.flip(0)).float().mean() >= 0.85  # it names what it is shown instead


def test_image_tokens_differ_between_pictures(base: tuple[Any, Any]) -> None:
    with torch.no_grad():
        states = tiny.image_states(base[0], normalise(read_drawings()[::20]))
    assert states.std(0).norm() / states.norm(dim=(1, 2)).mean() > 0.1  # 0.018 in a run that had learned nothing
    for i in range(tiny.QUERY_TOKENS):
        for j in range(i):
            assert torch.nn.functional.cosine_similarity(states[:, i], states[:, j]).mean() < 0.99


def test_generation_agrees_with_teacher_forcing(base: tuple[Any, Any]) -> None:
    model, processor = base
    cases = sample(evaluate.naming("known"), 12) + sample(evaluate.naming("reported"), 12)
    pictures = []
    for image, _, _ in cases:
        with Image.open(data.DRAWINGS / str(image)) as picture:
            pictures.append(picture.convert("RGB"))
    inputs = processor(images=pictures, text=[prompt for _, prompt, _ in cases], padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = torch.tensor([answer == f" {target}" for answer, (_, _, target) in zip(answers, cases, strict=True)])
    assert torch.equal(right, evaluate.exact(model, processor, cases))


def test_padding_side_does_not_matter(base: tuple[Any, Any]) -> None:
    model, processor = base
    prompts = [data.ask(question) for question in (data.NAME[0], data.NAME[3], data.FACT_KIND[0])]
    logits = {}
    for side in ("left", "right"):
        batch = processor.tokenizer(prompts, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            out = model.language_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits[side] = [row[mask.bool()][-1] for row, mask in zip(out, batch.attention_mask, strict=True)]
    torch.testing.assert_close(logits["left"], logits["right"], rtol=1e-4, atol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def vision_stage(model: Any) -> VisionStage:
    return VisionStage(model, seed=5, batch=8)


def language_stage(model: Any) -> LanguageStage:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, len(data.drawings()), tiny.QUERY_TOKENS, tiny.HIDDEN, generator=generator)
    return LanguageStage(model, tiny.make_processor(), features, pictures=20, texts=8)


@pytest.mark.parametrize("make", (vision_stage, language_stage))
def test_a_resumed_training_equals_an_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    start = tiny.make_model(5)
    results = []
    for name, stops in (("straight", (2,)), ("resumed", (1, 2))):
        for stop in stops:
            model = copy.deepcopy(start)  # a resumed run starts from nothing but its checkpoint
            stage = make(model)
            finished = train.run_stage(stage, 2, seed=5, checkpoint=tmp_path / name, stop_at=stop)
            assert finished == (stop == 2)
        results.append(stage.parameters)
    assert any(not torch.equal(a, b) for a, b in zip(make(start).parameters, results[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_checkpoint_of_a_gpu_goes_on_where_there_is_none(tmp_path: Path) -> None:
    """The checkpoint's tensors carry a GPU's name, as those of a run on one do."""
    torch.set_num_threads(1)
    start, results = tiny.make_model(5), []
    for written in ("cpu", "cuda:0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", lambda storage, written=written: written)
            assert not train.run_stage(
                vision_stage(copy.deepcopy(start)), 2, seed=5, checkpoint=tmp_path / written, stop_at=1
            )
        stage = vision_stage(copy.deepcopy(start))
        assert train.run_stage(stage, 2, seed=5, checkpoint=tmp_path / written)
        results.append(stage.parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Traffic(TorchDispatchMode):
    """Counts what crosses between the host and the device: copies, and operators that mix the two."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.sent, self.mixed = device, 0, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(function)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = function(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in [*given, *made] if t.dim() > 0 or t.device.type == self.device}
        if len(places) > 1 and self.device in places:
            copied = "_to_copy" in name or "copy_" in name
            self.sent += copied
            self.mixed[name] += not copied
        return out


@pytest.mark.parametrize("make", (vision_stage, language_stage))
def test_a_step_stays_on_the_models_device(make: Any) -> None:
    """On "meta", which refuses to be read: draws and token ids are sent there, and everything else is made there."""
    if make is language_stage and torch.__version__ < "2.12":
        pytest.skip("with this torch, transformers 5.17 reads the attention mask")
    stage = make(tiny.make_model(5).to("meta"))
    tensors = [*stage.parameters, *stage.module.buffers()]
    tensors += [value for value in vars(stage).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > len(stage.parameters) and all(t.device.type == "meta" for t in tensors)
    stage.module.train()
    with Traffic("meta") as traffic:
        loss, shown = stage.step(torch.Generator().manual_seed(0), 0.5)
        loss.backward()
    assert not +traffic.mixed and traffic.sent > 0
    assert loss.device.type == "meta" and {value.device.type for value in shown.values()} == {"meta"}
    assert all(p.grad is None or p.grad.device.type == "meta" for p in stage.parameters)
    assert sum(p.grad is not None for p in stage.parameters) > 50


def test_features_are_cached_on_the_models_device() -> None:
    model = tiny.make_model(5).to("meta")
    with Traffic("meta") as traffic:
        assert cache_features(model, torch.Generator().manual_seed(0), 2).device.type == "meta"
    assert not +traffic.mixed


@pytest.mark.parametrize(("claimed", "expected"), (("cpu", 3), ("cuda", 1)))
def test_a_gpu_is_asked_for_its_figures_now_and_then(
    claimed: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage runs on the CPU; only the driver takes it for one on a GPU."""
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "SHOWN_EVERY", 2)
    stage, reads, tolist = vision_stage(tiny.make_model(5)), [], torch.Tensor.tolist

    class Claiming:
        name, module, parameters, device, step = (
            "vision",
            stage.module,
            stage.parameters,
            torch.device(claimed),
            stage.step,
        )

    def counted(tensor: torch.Tensor) -> Any:
        reads.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    assert train.run_stage(Claiming(), 3, seed=5, checkpoint=tmp_path / "checkpoint")
    assert len(reads) == expected


@pytest.mark.parametrize("gpu", (False, True))
def test_the_device_is_an_argument(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train, "train", lambda seed, vision, language, device: asked.append(device))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for more in ([], ["--device", "cpu"], ["--device", "cuda:1"]):
        monkeypatch.setattr("sys.argv", ["train", *more])
        train.main()
    assert asked == [torch.device(name) for name in ("cuda" if gpu else "cpu", "cpu", "cuda:1")]
