"""MiniGPT-4 from ready parts: the wrapping, the picture's place among the tokens, and edits on its language model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import unike_kernels as uk
from tests.factories import make_edits
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.minigpt4 import IMAGE, MiniGPT4, MiniGPT4Processor
from unike_kernels.models import find_decoder
from unike_kernels.patching import fingerprint

QUERIES, HIDDEN, SIDE, EOS = 3, 16, 8, 2
TEXT = "# ### Human Assistant : < > </ Img ? what is this thing a cat dog red blue on the table two of them"
PUBLISHED = {"visual_encoder", "ln_vision", "Qformer", "query_tokens", "llama_proj", "llama_model"}
FP32 = {"rtol": 1e-4, "atol": 1e-5}  # LLaMA's norms and rotations compute in fp32 also in a double model
QUESTIONS = ["what is this ?", "is the cat on the table ?", "red ?"]


@pytest.fixture
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *TEXT.split()])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def processor(tokenizer):
    return MiniGPT4Processor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer, QUERIES)


def make_llama(tokenizer, layers=5):
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) - (IMAGE in tokenizer.get_vocab()),  # no row for the placeholder
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config).double()


def make_blip2():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = Blip2Config(
        vision_config={**sizes, "image_size": SIDE, "patch_size": 4, "initializer_range": 0.3},
        qformer_config={**sizes, "encoder_hidden_size": 12, "initializer_range": 0.3, "vocab_size": 9},
        text_config={**sizes, "model_type": "opt", "ffn_dim": 16, "vocab_size": 9, "word_embed_proj_dim": 12},
        num_query_tokens=QUERIES,
    )
    blip2 = Blip2ForConditionalGeneration(config)
    nn.init.normal_(blip2.query_tokens)
    return blip2.double()


@pytest.fixture
def model(tokenizer):
    return MiniGPT4.from_blip2(make_blip2(), make_llama(tokenizer), tokenizer).eval()


def picture(seed):
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


PICTURES = [picture(seed) for seed in range(3)]


def batch(processor, side="right", questions=QUESTIONS):
    processor.tokenizer.padding_side = side
    inputs = processor(images=PICTURES[: len(questions)], text=questions, return_tensors="pt", padding=True)
    return {**inputs, "pixel_values": inputs["pixel_values"].double()}


def edits_for(model):
    decoder = find_decoder(model)
    layers = decoder.default_layers()
    base = fingerprint(model, decoder, layers)
    # without calibration cases the router lets every case through, to its nearest edit
    return make_edits(d=HIDDEN, layers=layers, gated=True, base=base, dtype=torch.float64, n_cases=0)


def moved(a, b):
    return (a - b).abs().amax()


# The wrapping


def test_a_question_is_wrapped_as_published(processor, tokenizer):
    ids = processor(images=PICTURES[0], text="what is this ?", return_tensors="pt")["input_ids"]
    image = [processor.image_token_id] * QUERIES
    assert ids.shape[0] == 1 and ids[0, 0] == tokenizer.bos_token_id
    assert (ids == tokenizer.bos_token_id).sum() == 1
    before = [1, *tokenizer("###Human: <Img>", add_special_tokens=False)["input_ids"], *image]
    assert ids[0].tolist()[: len(before)] == before
    assert tokenizer.decode(ids[0, len(before) :]) == "</ Img > what is this ? ### Assistant :"
    assert processor.image_token_id == len(tokenizer) - 1 and tokenizer.unk_token_id not in ids


def test_template_is_a_choice(processor, tokenizer):
    other = MiniGPT4Processor(processor.image_processor, tokenizer, QUERIES, f"# {{}} <Img>{IMAGE}</Img>")
    assert tokenizer.decode(other.wrap("a cat"), skip_special_tokens=True) == "# a cat < Img > </ Img >"
    assert len(other.wrap("a {} cat")) == len(other.wrap("a cat")) + 1  # braces in a question are a question's


@pytest.mark.parametrize("template", ["{}", IMAGE, f"{IMAGE} {IMAGE} {{}}", f"{IMAGE} {{}} {{}}"])
def test_template_without_one_picture_and_one_question_is_refused(template, tokenizer):
    with pytest.raises(ValueError, match="template"):
        MiniGPT4Processor(None, tokenizer, QUERIES, template)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, processor):
    inputs = batch(processor, side)
    assert inputs["pixel_values"].shape == (3, 3, SIDE, SIDE)
    for row, mask, question in zip(inputs["input_ids"], inputs["attention_mask"], QUESTIONS, strict=True):
        assert row[mask.bool()].tolist() == processor.wrap(question)
        assert (row[~mask.bool()] == EOS).all()
        assert mask[-1 if side == "left" else 0] == 1


def test_text_alone_is_the_tokenizers(processor, tokenizer):
    inputs = processor(text=["a cat", "the red dog"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"][0].tolist() == [*tokenizer("a cat")["input_ids"], EOS]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_processor_refuses_what_cannot_fit(processor):
    with pytest.raises(ValueError, match="one text per image"):
        processor(images=PICTURES[:2], text=["a", "b", "c"], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match="must not contain"):
        processor(images=PICTURES[0], text=f"what is {IMAGE}")


# The model


def test_logits_and_labels_line_up_with_the_tokens(model, processor):
    inputs = batch(processor)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.image_token_id, -100)
    out = model(**inputs, labels=labels)
    assert out.logits.shape == (*inputs["input_ids"].shape, model.llama_model.config.vocab_size)
    assert out.loss.isfinite()


def test_equals_the_published_concatenation(model, processor):
    """The published code wraps by concatenating embeddings; placeholders must give the same sequence."""
    inputs = processor(images=PICTURES[0], text="a cat ?", return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    look = model.llama_model.get_input_embeddings()
    before, after = (
        look(processor.tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"])
        for part in ("###Human: <Img>", "</Img> a cat ? ###Assistant: ")
    )
    seen = model.visual_encoder(pixels).last_hidden_state
    image = model.llama_proj(model.Qformer(model.query_tokens, encoder_hidden_states=seen).last_hidden_state)
    whole = torch.cat([look(torch.tensor([[1]])), before, image, after], dim=1)
    assert torch.equal(model.embed(inputs["input_ids"], pixels), whole)
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=pixels)
    assert torch.equal(out.logits, model.llama_model(inputs_embeds=whole).logits)


def test_pictures_count(model, processor):
    inputs = batch(processor, questions=["a cat ?", "a cat ?"])
    logits = model(**inputs).logits
    assert moved(logits[0, -1], logits[1, -1]) > 1e-3
    swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    torch.testing.assert_close(swapped, logits.flip(0))


def test_text_alone_is_the_language_model(model, tokenizer):
    inputs = tokenizer("what is this ?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, model.llama_model(**inputs).logits)
    ours = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    theirs = model.llama_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, theirs[:, inputs["input_ids"].shape[1] :])


def test_wrong_number_of_placeholders_is_refused(model, processor):
    inputs = batch(processor)
    with pytest.raises(ValueError, match="2 pictures take 6 image placeholders"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="0 pictures"):
        model.generate(inputs["input_ids"], inputs["attention_mask"])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_ignores_padding(beams, model, processor):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**batch(processor, "left"), **options)
    assert together.shape == (3, 5)
    for row, (image, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
        one = processor(images=image, text=question, return_tensors="pt")
        one["pixel_values"] = one["pixel_values"].double()
        assert torch.equal(model.generate(**one, **options)[0], together[row])


class Tower(nn.Sequential):
    """A tower that gives a tensor and casts nothing, as the published one does: pictures -> [B, P, 12]."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 12, 4, stride=4), nn.Flatten(2))

    def forward(self, image):
        return super().forward(image).mT


def parts_of_the_published_shape(model, tokenizer, ln_vision):
    """The tower's norm apart, the Q-Former inside `bert`."""
    holder = nn.Module()
    holder.bert = model.Qformer
    parts = (Tower().double(), ln_vision, holder, model.query_tokens, model.llama_model, tokenizer)
    return MiniGPT4(*parts, model.llama_proj).eval()


def test_parts_of_the_published_shape(model, tokenizer, processor):
    other = parts_of_the_published_shape(model, tokenizer, nn.LayerNorm(12).double())
    inputs = batch(processor, questions=QUESTIONS[:1])
    seen = nn.functional.layer_norm(other.visual_encoder(inputs["pixel_values"]), [12])
    image = model.llama_proj(model.Qformer(model.query_tokens, encoder_hidden_states=seen).last_hidden_state)
    assert torch.equal(other.encode_img(inputs["pixel_values"]), image)
    assert {key.split(".")[0] for key in other.state_dict()} == PUBLISHED


def test_parts_of_other_dtypes(model, tokenizer, processor):
    """A half-precision tower, a single-precision Q-Former, another language model: as people load them."""
    other = parts_of_the_published_shape(model, tokenizer, nn.Identity())
    other.visual_encoder.bfloat16()
    other.Qformer.float()
    other.query_tokens.data = other.query_tokens.data.float()
    seen = []
    other.Qformer.bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].dtype), with_kwargs=True
    )
    inputs = processor(images=PICTURES[0], text="a cat ?", return_tensors="pt")
    assert other(**inputs).logits.dtype == torch.float64 and seen == [torch.float32]
    fresh = MiniGPT4.from_blip2(make_blip2().float(), model.llama_model, tokenizer)
    assert fresh.llama_proj.weight.dtype == torch.float32


def test_names_are_the_published_ones(model):
    assert {key.split(".")[0] for key in model.state_dict()} == PUBLISHED - {"ln_vision"}
    assert find_decoder(model).name == "llama_model.model"
    published = {"llama_proj.weight": torch.ones(HIDDEN, 12), "llama_proj.bias": torch.zeros(HIDDEN)}
    assert model.load_state_dict(published, strict=False).unexpected_keys == []
    assert (model.llama_proj.weight == 1).all()


def test_modules_are_shared_with_blip2(tokenizer):
    blip2 = make_blip2()
    model = MiniGPT4.from_blip2(blip2, make_llama(tokenizer), tokenizer)
    assert model.Qformer is blip2.qformer and model.query_tokens is blip2.query_tokens
    assert model.llama_proj.weight.shape == (HIDDEN, 12)


# Edits on it


@pytest.mark.parametrize("routing", ["always", "routed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_patched_rows_do_not_see_their_padding(side, routing, model, processor):
    inputs = batch(processor, side)
    base = model(**inputs).logits
    with uk.patch(model, edits_for(model), routing=routing) as handle:
        together = model(**inputs).logits
        for row, (image, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
            one = processor(images=image, text=question, return_tensors="pt")
            alone = model(**{**one, "pixel_values": one["pixel_values"].double()}).logits[0]
            here = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, here], alone, **FP32)
            assert moved(base[row, here][-1], alone[-1]) > 1e-2
        with handle.disabled():
            assert torch.equal(model(**inputs).logits, base)
    assert torch.equal(model(**inputs).logits, base)


def test_text_alone_takes_the_edits(model, tokenizer):
    inputs = tokenizer("what is this ?", return_tensors="pt")
    base = model(**inputs).logits
    with uk.patch(model, edits_for(model), routing="always"):
        edited = model(**inputs).logits
        assert moved(edited, base) > 1e-3
        assert torch.equal(edited, model.llama_model(**inputs).logits)


def test_labels_name_the_case_tokens(model, processor):
    samples = [Sample(q, "two of them", image) for q, image in zip(QUESTIONS, PICTURES, strict=True)]
    collator = Collator(model, processor)
    for side in ("left", "right"):
        made = collator.batch(samples, [0, 1, 2], side=side)
        with uk.patch(model, edits_for(model), routing="always") as handle:
            model(**made.inputs, labels=made.labels(), use_cache=False)
            found = handle.record.runtime.tracker.current.case_tokens
        assert torch.equal(found, made.case_rows())
        last = made.inputs["input_ids"].flatten()[found]
        assert (last == processor.wrap("a")[-1]).all()  # the template's last token


def test_collator_targets_follow_the_template(model, processor, tokenizer):
    made = Collator(model, processor).batch([Sample("a cat ?", "red", PICTURES[0])], [0])
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    assert made.inputs["input_ids"][0].tolist() == [*processor.wrap("a cat ?"), *red, EOS]


def greedy_without_cache(model, handle, inputs, steps):
    """Greedy new tokens by running the whole sequence at every step, with the case token where the prompt ends."""
    ids, new = inputs["input_ids"], []
    width = ids.shape[1]
    for _ in range(steps):
        if handle is not None:
            handle.set_cases(torch.zeros(ids.shape[1], dtype=torch.long), torch.tensor([width - 1]))
        out = model(ids, torch.ones_like(ids), inputs["pixel_values"], use_cache=False)
        new.append(out.logits[:, -1].argmax(-1))
        ids = torch.cat([ids, new[-1][:, None]], dim=1)
    return torch.stack(new, dim=1)


@pytest.mark.parametrize("routing", ["always", "routed"])
def test_generate_with_edits_on_and_off(routing, model, processor):
    inputs = batch(processor, questions=QUESTIONS[:1])
    options = {"max_new_tokens": 6, "do_sample": False}
    model.llama_model.generation_config.eos_token_id = None
    base = model.generate(**inputs, **options)
    assert torch.equal(base, greedy_without_cache(model, None, inputs, 6))
    with uk.patch(model, edits_for(model), routing=routing) as handle:
        edited = model.generate(**inputs, **options)
        with handle.disabled():
            assert torch.equal(model.generate(**inputs, **options), base)
        assert torch.equal(edited, greedy_without_cache(model, handle, inputs, 6))
    assert not torch.equal(edited, base)
    assert torch.equal(model.generate(**inputs, **options), base)


def test_beams_with_edits_ignore_padding(model, processor):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with uk.patch(model, edits_for(model), routing="routed"):
        together = model.generate(**batch(processor, "left"), **options)
        for row, (image, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
            one = processor(images=image, text=question, return_tensors="pt")
            one["pixel_values"] = one["pixel_values"].double()
            assert torch.equal(model.generate(**one, **options)[0], together[row])


def test_collator_generates_for_pictures_and_text(model, processor, tokenizer):
    samples = [Sample("what is this ?", None, PICTURES[0]), Sample("the cat ?"), Sample("red ?", None, PICTURES[1])]
    with uk.patch(model, edits_for(model), routing="always"):
        answers = Collator(model, processor).generate(samples, max_new_tokens=4)
        for sample, answer in zip(samples, answers, strict=True):
            inputs = processor(images=sample.image, text=sample.prompt, return_tensors="pt")
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert answer == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_answers_end_at_the_published_end_sign(model, processor):
    assert model.end_sym == "###"
    collator, asked = Collator(model, processor), [Sample("what is this ?", None, PICTURES[0])]
    model.end_sym = ""
    whole = collator.generate(asked, max_new_tokens=6)[0]
    model.end_sym = whole.split()[-1]  # stands in for the sign, which random weights need not say
    cut = collator.generate(asked, max_new_tokens=6)[0]
    assert whole.startswith(cut) and model.end_sym not in cut and len(cut) < len(whole)


def test_copies_keep_the_model_and_its_patch(model, processor):
    inputs = batch(processor)
    base, keys = model(**inputs).logits, list(model.state_dict())
    with uk.patch(model, edits_for(model), routing="routed"):
        edited = model(**inputs).logits
        with pytest.warns(UserWarning, match="carries edits"):
            assert list(model.state_dict()) == keys
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
            assert torch.equal(other(**inputs).logits, edited)
            uk.unpatch(other)
            assert torch.equal(other(**inputs).logits, base)
        assert torch.equal(model(**inputs).logits, edited)


def test_refused_edits_change_nothing(model, processor):
    inputs = batch(processor)
    base, keys = model(**inputs).logits, list(model.state_dict())
    with pytest.raises(ValueError, match="another architecture"):
        uk.patch(model, make_edits(d=HIDDEN, layers=(1, 2), gated=True))
    assert list(model.state_dict()) == keys and len(uk.status(model)) == 0
    assert torch.equal(model(**inputs).logits, base)


def test_editor_edits_it(model, processor):
    model.float()
    config = uk.UnikeConfig(encoders=uk.EncoderConfig(steps=20))
    editor = uk.Editor(model, processor, config)
    names = ("a cat", "a dog", "the table")
    editor.build_memory([{"image": picture(i), "prompt": "what is this ?", "target": names[i % 3]} for i in range(6)])
    editor.fit()
    request = {"image": picture(9), "prompt": "what is this ?", "target": "red table"}
    edits = editor.edit([request])
    assert edits.entries[0].success
    ask = [Sample(request["prompt"], None, request["image"])]
    before = Collator(model, processor).generate(ask, max_new_tokens=3)
    with uk.patch(model, edits):
        assert Collator(model, processor).generate(ask, max_new_tokens=3) == ["red table"]
    assert before != ["red table"] and Collator(model, processor).generate(ask, max_new_tokens=3) == before
