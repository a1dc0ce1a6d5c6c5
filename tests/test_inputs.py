"""Samples as padded inputs: target tokens, case tokens, padding, pictures, generated answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.editing_tiny import ask, make_processor, make_requests, make_tokenizer, picture
from tests.models_tiny import IMAGE, MODELS, MULTIMODAL, PAD, make_model
from unike_kernels.editing.inputs import Collator, Sample, image_digest
from unike_kernels.editing.requests import read_requests
from unike_kernels.evaluation.metrics import token_accuracy

TEXTS = ["Question: what is this? Answer: floppy disk", "a red cat\nand a dog", "the floppy cat asks what it is"]


def trained_tokenizer(kind):
    """A sub-word tokenizer as OPT has (bytes; a word begins with its space) or as LLaMA has (sentencepiece's mark)."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "sentencepiece"))
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        special += [f"<0x{i:02X}>" for i in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def samples_of(requests):
    return [Sample(r["prompt"], r["target"], r["image"]) for r in requests]


# Target tokens


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Question: what is this? Answer:", "Question: what is this? Answer: floppy disk"),
        ("Question: what is this? Answer: ", "Question: what is this? Answer: floppy disk"),
        ("what is this\n", "what is this\nfloppy disk"),
        ("", " floppy disk"),
    ],
    ids=["colon", "space", "newline", "nothing"],
)
def test_target_follows_the_prompt_after_one_space(kind, prompt, text):
    tokenizer = trained_tokenizer(kind)
    ids = Collator(nn.Linear(1, 1), tokenizer).target_ids(prompt, " floppy disk \n")
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(before + ids).strip() == text.strip()
    if not prompt.endswith(" "):  # where no token spans the boundary, the ids are those of the whole text
        assert before + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids and len(ids) > 1


def test_an_answer_is_never_one_unknown_token():
    """A list passed to a tokenizer is taken for tokens: every answer becomes the same <unk>, and is always right."""
    tokenizer = trained_tokenizer("bytes")
    bug = [tokenizer.convert_tokens_to_ids([answer]) for answer in ("floppy disk", "a red cat")]
    assert bug[0] == bug[1] == [tokenizer.unk_token_id]
    assert token_accuracy(*map(torch.tensor, bug)) == 1.0
    collator = Collator(nn.Linear(1, 1), tokenizer)
    disk, cat = (collator.target_ids("what is this?", answer) for answer in ("floppy disk", "a red cat"))
    assert tokenizer.unk_token_id not in disk + cat and disk != cat


def test_targets_that_cannot_be_taught_are_refused():
    collator = Collator(make_model("llama"), make_tokenizer())
    with pytest.raises(ValueError, match="no token for a part of the target 'red zebra'"):
        collator.target_ids("what is this ?", "red zebra")
    with pytest.raises(ValueError, match="target of prompt 'what' is empty"):
        collator.target_ids("what", " \n")


def test_a_target_that_a_tokenizer_takes_for_nothing_is_refused():
    tokenizer = trained_tokenizer("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")  # as BERT's drops what has no width
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    with pytest.raises(ValueError, match="no token for the target"):
        Collator(nn.Linear(1, 1), tokenizer).target_ids("what is this?", "\u200b")


# Batches


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_positions(name, side, eos):
    collator = Collator(make_model(name), make_processor(name))
    samples = samples_of(make_requests(name, 5))
    batch = collator.batch(samples, [3, 0, 4], eos=eos, side=side)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert batch.rows == [3, 0, 4] and batch.model is collator.model
    for r, sample in enumerate(samples[i] for i in batch.rows):
        target = collator.tokenizer(sample.target, add_special_tokens=False)["input_ids"]
        asked = collator.batch([Sample(sample.prompt, None, sample.image)], [0])
        prompt = asked.inputs["input_ids"][0].tolist()
        assert ids[r][mask[r]].tolist() == prompt + target + [collator.eos] * eos
        assert (ids[r][~mask[r]] == PAD).all() and mask[r, -1 if side == "left" else 0]
        assert ids[r][batch.target_mask[r]].tolist() == target + [collator.eos] * eos
        assert ids[r, batch.case_position[r]] == prompt[-1]
        assert batch.target_mask[r].nonzero()[0] == batch.case_position[r] + 1
        assert batch.last_position[r] == batch.case_position[r] + len(target)
        assert asked.last_position == asked.case_position == len(prompt) - 1
    b, s = batch.shape
    assert torch.equal(ids.flatten()[batch.case_rows()], ids.gather(1, batch.case_position[:, None])[:, 0])
    cases = batch.token_to_case().view(b, s)
    assert torch.equal(cases >= 0, mask) and all((cases[r][mask[r]] == r).all() for r in range(b))
    assert torch.equal(batch.labels() != -100, batch.target_mask)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_image_tokens_come_before_the_text(name):
    collator = Collator(make_model(name), make_processor(name))
    batch = collator.batch(samples_of(make_requests(name)), [0, 1])
    assert ((batch.inputs["input_ids"] == IMAGE).sum(dim=1) == 4).all()
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert not torch.equal(batch.inputs["pixel_values"][0], batch.inputs["pixel_values"][1])


@pytest.mark.parametrize("name", MULTIMODAL)
def test_text_alone_goes_to_what_answers_text(name):
    model = make_model(name)
    collator = Collator(model, make_processor(name))
    batch = collator.batch([Sample("what is this ?", "red dog")], [0])
    assert batch.model is (model.language_model if name == "blip2" else model)
    assert set(batch.inputs) == {"input_ids", "attention_mask"} and (batch.inputs["input_ids"] != IMAGE).all()
    with pytest.raises(ValueError, match="all have a picture"):
        collator.batch([Sample("what ?"), Sample(**ask(name, "what ?", 0))], [0, 1])


def test_batches_keep_order_and_separate_pictures():
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    samples = [Sample(**ask("blip2", "what ?", i if i % 3 else None)) for i in range(8)]
    found = [batch.rows for batch in collator.batches(samples, 2)]
    assert found == [[1, 2], [4, 5], [7], [0, 3], [6]]


def test_pictures_come_in_the_models_dtype():
    for dtype in (torch.bfloat16, torch.float64):
        collator = Collator(make_model("blip2", dtype=dtype), make_processor("blip2"))
        assert collator.batch(samples_of(make_requests("blip2")), [0]).inputs["pixel_values"].dtype == dtype


class OtherFeatures:
    """A processor with one feature per token, one per picture and one whose size depends on the picture."""

    def __init__(self):
        self.tokenizer = make_tokenizer()

    def __call__(self, images, text, return_tensors):
        made = dict(self.tokenizer(text, return_tensors=return_tensors))
        types = torch.where(made["input_ids"] == IMAGE, 1, 2)
        return made | {
            "mm_token_type_ids": types,
            "grid": torch.tensor([[1, 2, images]]),
            "patches": torch.ones(images, 3),
        }


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_per_token_are_padded_with_the_tokens(side):
    collator = Collator(make_model("llama"), OtherFeatures())
    batch = collator.batch([Sample("what ?", "red dog", 2), Sample("what is this ?", "moon", 3)], [0, 1], side=side)
    types, mask = batch.inputs["mm_token_type_ids"], batch.inputs["attention_mask"]
    prompt = (torch.arange(mask.shape[1]) <= batch.case_position[:, None]) & (mask == 1)
    assert torch.equal(types, torch.where(prompt, 2, 0))
    assert batch.inputs["grid"].tolist() == [[1, 2, 2], [1, 2, 3]]
    assert batch.inputs["patches"].shape == (5, 3)


def test_pictures_that_do_not_stack_are_named():
    class Ragged(OtherFeatures):
        def __call__(self, images, text, return_tensors):
            return super().__call__(images, text, return_tensors) | {"patches": torch.ones(1, images)}

    collator = Collator(make_model("llama"), Ragged())
    with pytest.raises(ValueError, match=r"patches of different shapes: \[\(1, 2\), \(1, 3\)\]"):
        collator.batch([Sample("what ?", "moon", 2), Sample("what ?", "moon", 3)], [0, 1])


def test_odd_tokenizers():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("what")  # LLaMA has no use for them, and its generate() refuses them
    tokenizer.pad_token = None
    collator = Collator(make_model("llama"), tokenizer)
    assert collator.pad == collator.eos and "token_type_ids" not in collator.batch([Sample("what")], [0]).inputs
    assert len(collator.generate([Sample("what")], max_new_tokens=2)) == 1
    tokenizer.eos_token = None
    collator = Collator(make_model("llama"), tokenizer)
    batch = collator.batch([Sample("what", "red dog")], [0])
    assert collator.pad == 0 and batch.target_mask.sum() == 2  # nothing to end a target with
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="has no token"):
        collator.batch([Sample(" ")], [0])


# Generated answers


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_greedy_whatever_the_padding(name):
    model = make_model(name)
    collator = Collator(model, make_processor(name))
    samples = [Sample(r["prompt"], None, r["image"]) for r in make_requests(name, 5)]
    samples.insert(2, Sample("which thing ?"))
    together = collator.generate(samples, batch_size=3, max_new_tokens=4)
    assert len(set(together)) > 1
    for sample, answer in zip(samples, together, strict=True):
        batch = collator.batch([sample], [0])
        ids = batch.inputs["input_ids"]
        new: list[int] = []
        while len(new) < 4 and (not new or new[-1] != collator.eos):
            inputs = {**batch.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                new.append(int(batch.model(**inputs).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
        assert answer == collator.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_echo_is_cut_only_where_there_is_one():
    class Fixed(nn.Module):
        def __init__(self, echo):
            super().__init__()
            self.echo, self.weight = echo, nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            raise NotImplementedError

        def generate(self, input_ids, **kw):
            new = torch.full((len(input_ids), 9), 14)
            return torch.cat([input_ids, new], dim=1) if self.echo else new

    for echo in (True, False):
        collator = Collator(Fixed(echo), make_tokenizer())
        batch = collator.batch([Sample("what is this ?"), Sample("what ?")], [0, 1], side="left")
        assert torch.equal(collator.generate_ids(batch), torch.full((2, 9), 14))


# Pictures' digests


def test_digests_tell_pictures_apart(tmp_path):
    image, same, other = picture(0), picture(0), picture(1)
    assert image_digest(image) == image_digest(same) != image_digest(other)
    assert image_digest(None) is None
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    kinds = [image, pixels, pixels.reshape(2, 8), torch.ones(2, 2).bfloat16(), [image, other], [other, image], "name"]
    assert len({image_digest(kind) for kind in kinds}) == len(kinds)
    assert image_digest(torch.ones(2, 2).bfloat16()) == image_digest(torch.ones(2, 2))
    path = tmp_path / "picture.png"
    image.save(path)
    first = image_digest(path)
    assert first == image_digest(str(path))
    other.save(path)
    assert image_digest(path) != first
    with_palette = [Image.new("P", (2, 2), 1) for _ in "ab"]
    for image, colour in zip(with_palette, ([255, 0, 0], [0, 0, 255]), strict=True):
        image.putpalette([0, 0, 0, *colour])
    assert image_digest(with_palette[0]) != image_digest(with_palette[1])
    assert image_digest("iVBORw0KGgo" * 1000) != image_digest("iVBORw0KGgp" * 1000)  # encoded: no file has such a name


# Pictures' files


def test_a_file_gives_what_its_picture_gives(tmp_path):
    """Some processors put transparent parts on white, some on black: a file must not come out otherwise."""
    processor = make_processor("blip2")
    collator = Collator(make_model("blip2"), processor)
    pictures = {
        "rgb": picture(0),
        "transparent": Image.new("RGBA", (8, 8), (200, 30, 30, 60)),
        "grey": picture(1).convert("L"),
        "palette": picture(2).convert("P"),
    }
    for name, image in pictures.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        given = processor(images=Image.open(path), text="what", return_tensors="pt")["pixel_values"]
        batch = collator.batch([Sample("what", image=path), Sample("what", image=str(path))], [0, 1])
        assert torch.equal(batch.inputs["pixel_values"], given.expand(2, -1, -1, -1)), name
    processor.image_processor.do_convert_rgb = False  # then nobody would: the file is opened as RGB
    batch = collator.batch([Sample("what", image=tmp_path / "palette.png")], [0])
    assert batch.inputs["pixel_values"].shape == (1, 3, 8, 8)


def test_a_damaged_picture_is_named(tmp_path):
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    picture(0).resize((64, 64)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"no picture"):
        (tmp_path / "cut.jpg").write_bytes(content)
        with pytest.raises(OSError, match=r"cut\.jpg cannot be read as a picture"):
            collator.batch([Sample("what", image=tmp_path / "cut.jpg")], [0])


def test_a_picture_that_was_opened_but_not_read_is_named(tmp_path):
    picture(0).resize((64, 64)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    with pytest.raises(OSError, match="the picture cannot be read: image file is truncated"):
        collator.check(Sample("what", image=Image.open(tmp_path / "cut.jpg")))
    request = {"prompt": "what", "target": "moon", "image": Image.open(tmp_path / "cut.jpg")}
    with pytest.raises(OSError, match="the picture of request 0 cannot be read: image file is truncated"):
        read_requests([request], None)


@pytest.mark.parametrize("raised", [RuntimeError, Image.DecompressionBombError, NotImplementedError, IndexError])
def test_whatever_pil_raises_names_the_picture(raised, tmp_path, monkeypatch):
    """Its readers do not agree on an error: AVIF's raises RuntimeError, DDS's NotImplementedError."""

    def fail(self, *args, **options):
        raise raised("odd")

    picture(0).save(tmp_path / "odd.png")
    monkeypatch.setattr(Image.Image, "load", fail)
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    for call in (collator.check, lambda sample: collator.batch([sample], [0])):
        with pytest.raises(OSError, match=r"odd\.png cannot be read as a picture: odd"):
            call(Sample("what", image=tmp_path / "odd.png"))


def test_a_name_that_is_no_file_is_told():
    collator = Collator(make_model("blip2"), make_processor("blip2"))
    with pytest.raises(OSError) as caught:
        collator.batch([Sample("what", image="nofile.png")], [0])
    assert str(caught.value) == "there is no picture 'nofile.png'"  # not that it is no address, nor encoded
    with pytest.raises(OSError, match=r"there is no picture 'iVBORw0[^']*\.\.\.': ") as caught:
        collator.batch([Sample("what", image="iVBORw0KGgo" * 1000)], [0])
    assert len(str(caught.value)) < 1000  # an encoded picture is not repeated


def test_an_address_that_cannot_be_reached_is_told(monkeypatch):
    collator = Collator(make_model("blip2"), make_processor("blip2"))

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(collator.processor, "image_processor", unreachable)
    with pytest.raises(OSError, match="there is no picture 'https://nowhere.example/cat.png': "):
        collator.batch([Sample("what", image="https://nowhere.example/cat.png")], [0])


@pytest.mark.parametrize(
    ("name", "prompt", "pictures", "message"),
    [
        ("blip2", "<image> what ?", 1, "holds '<image>', which the Blip2Processor puts in itself: '<image> what"),
        ("blip2", "<image> what ?", 0, "holds '<image>', but there is no picture"),
        ("llava", "<image> what ?", 0, "holds '<image>', but there is no picture"),
        ("llava", "<image> <image> what ?", 1, "holds '<image>' 2 times, but there is one picture"),
        ("llava", "what ?", 1, "LlavaProcessor does not take the picture with prompt 'what|not its token '<image>'"),
    ],
)
def test_prompts_hold_a_token_for_each_picture_where_the_processor_puts_none(name, prompt, pictures, message):
    collator = Collator(make_model(name), make_processor(name))
    with pytest.raises(ValueError, match=message):
        collator.batch([Sample(prompt, image=picture(0) if pictures else None)], [0])


def test_pictures_in_every_form_that_the_processor_takes():
    """Several in a prompt: as a list, a list in a list, an array, a tensor; and prompts that hold all their tokens."""
    collator = Collator(make_model("llava"), make_processor("llava"))
    two = [picture(0), picture(1)]
    arrays = np.stack([np.array(p) for p in two])
    for image in (two, [two], arrays, torch.tensor(arrays).permute(0, 3, 1, 2)):
        sample = Sample("<image> <image> what ?", image=image)
        collator.check(sample)
        assert collator.batch([sample], [0]).inputs["pixel_values"].shape[0] == 2
    older = make_processor("blip2")
    older.num_query_tokens = None
    sample = Sample("<image> <image> <image> <image> what ?", image=picture(0))
    Collator(make_model("blip2"), older).check(sample)


def test_the_fingerprint_tells_processors_apart():
    model = make_model("blip2")
    processor = make_processor("blip2")
    before = Collator(model, processor).fingerprint()
    processor(images=picture(0), text=["what", "what is this ?"], padding=True, truncation=True, return_tensors="pt")
    assert Collator(model, processor).fingerprint() == before == Collator(model, make_processor("blip2")).fingerprint()
    processor.image_processor.image_mean = [0.4] * 3
    assert Collator(model, processor).fingerprint() != before
    other = make_processor("blip2")
    other.tokenizer.add_tokens(["zebra"])
    assert Collator(model, other).fingerprint() != before
