"""Tokenizers, processors, pictures and triplets for the tiny models of every family."""

from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import Blip2Processor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import unike_kernels as uk
from tests.models_tiny import IMAGE, MULTIMODAL, PAD, QUERY_TOKENS, VOCABULARY, make_model
from unike_kernels.config import EncoderConfig, NeuronConfig, RoutingConfig, UnikeConfig
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.inputs import Sample
from unike_kernels.edits import LayerEdits

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
_TEXT = (
    "what is this thing which one do you see ? answer : a red blue green dog cat bird fish house tree car sun moon star"
)
WORDS = (*_TEXT.split(" "), "old", "new", "big", "small", "of", "the")
QUESTIONS = ("what is this ? answer :", "which thing do you see ?", "what is the old thing ? answer :")
TARGETS = ("red dog", "blue cat", "green bird house", "fish", "big sun", "moon")
FAST = EncoderConfig(steps=20)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the tiny models' vocabulary, with a start token."""
    names = [*SPECIAL, *WORDS]
    names += [f"w{i}" for i in range(VOCABULARY - len(names))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert (names.index("<pad>"), names.index("<image>")) == (PAD, IMAGE)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], padding_side="left", **named
    )


def make_processor(name: str) -> Any:
    """What `Editor` takes beside the tiny model `name`: a processor for pictures, a tokenizer for text."""
    tokenizer = make_tokenizer()
    pictures = BlipImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    if name == "blip2":
        return Blip2Processor(pictures, tokenizer, num_query_tokens=QUERY_TOKENS)
    if name == "llava":
        return LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
        )
    return tokenizer


def picture(seed: int) -> Image.Image:
    """A random picture, the same for the same seed."""
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def ask(name: str, question: str, image: int | None) -> dict[str, Any]:
    """{"prompt", "image"} as the tiny model `name` takes them: LLaVA's prompts hold the picture's token.

    For a language model the picture is two words before the question.
    """
    if image is None:
        return {"prompt": question, "image": None}
    if name not in MULTIMODAL:
        return {"prompt": f"{WORDS[image % 29]} {WORDS[image % 31 % 29]} {question}", "image": None}
    return {"prompt": f"<image> {question}" if name == "llava" else question, "image": picture(image)}


def make_triplets(name: str, n: int = 12, start: int = 100) -> list[dict[str, Any]]:
    """n questions with their answers, about n pictures where the model sees any."""
    return [{**ask(name, QUESTIONS[i % 3], start + i), "target": TARGETS[i % len(TARGETS)]} for i in range(n)]


def make_requests(name: str, n: int = 4) -> list[dict[str, Any]]:
    """n edits with ids, whose prompts have different lengths."""
    return [
        {"id": f"e{i}", **ask(name, QUESTIONS[i % 3] + " a" * (i // 3), i), "target": TARGETS[-1 - i % len(TARGETS)]}
        for i in range(n)
    ]


def routed(**neurons: Any) -> UnikeConfig:
    """Routed edits of two layers, a short fit and fast rates: random models have to be pushed harder than trained."""
    fast = {"lr_values": 0.1, "lr_keys": 0.02, "margin": 1.0, "steps": 30}
    return UnikeConfig(
        layers=(2, 4), encoders=FAST, routing=RoutingConfig(mode="routed"), neurons=NeuronConfig(**fast | neurons)
    )


def make_editor(name: str, config: UnikeConfig | None = None, *, dtype: torch.dtype = torch.float32) -> Editor:
    """An editor of a tiny random model with its memory and encoders."""
    model: nn.Module = make_model(name, dtype=dtype)
    editor = Editor(model, make_processor(name), config or routed())
    editor.build_memory(make_triplets(name), progress=False)
    editor.fit()
    return editor


def samples_of(requests):
    return [Sample(r["prompt"], r.get("target"), r.get("image")) for r in requests]


def answers(editor, requests, **kw):
    return editor.collator.generate(samples_of(requests), max_new_tokens=6, **kw)


def state_of(model):
    """Everything that an editor must leave alone."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], flags, hooks, [p.grad for p in model.parameters()]


def assert_same_state(model, before):
    after = state_of(model)
    assert all(torch.equal(a, b) for a, b in zip(after[0], before[0], strict=True))
    assert after[1:] == before[1:] and not uk.status(model)


def assert_close_layers(a: LayerEdits, b: LayerEdits, **tolerance):
    for f in fields(LayerEdits):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, msg=lambda m, n=f.name: f"{n}: {m}", **tolerance)
