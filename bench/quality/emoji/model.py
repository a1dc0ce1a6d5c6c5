"""The tiny BLIP-2 of the emoji benchmark: transformers' own classes at 2.6 M parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

HERE = Path(__file__).parent
TOKENIZER_FILE = HERE / "tokenizer.json"
IMAGE_SIZE = 32  # pixels, square
QUERY_TOKENS = 4  # image tokens per picture
HIDDEN = 128  # width of all three parts
VOCABULARY = 2048
INIT = 0.05  # standard deviation of the initial weights
BOX = 4  # PIL's area average, the filter that the training augmentation uses too
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>")  # ids 0..3; OPT's </s> both starts and ends, here it only ends


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, as OPT has, on `texts`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_processor(tokenizer: Tokenizer | None = None) -> Blip2Processor:
    """Transformers' processor: it puts `QUERY_TOKENS` <image> tokens before the text; no BOS, padding left."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or Tokenizer.from_file(str(TOKENIZER_FILE)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=BOX,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Blip2Processor(images, fast, num_query_tokens=QUERY_TOKENS)


def make_config() -> Blip2Config:
    """The configuration: ViT 3 x 128, Q-Former 2 x 128 with 4 queries, OPT 6 x 128 with ReLU."""
    vision = Blip2VisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        attention_dropout=0.0,
        initializer_range=INIT,  # the default of 1e-10 never learns
    )
    qformer = Blip2QFormerConfig(
        vocab_size=1,  # the Q-Former reads no text here
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        encoder_hidden_size=HIDDEN,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=8,
        initializer_range=INIT,
    )
    text = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=6,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=4,
        max_position_embeddings=96,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        init_std=INIT,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERY_TOKENS,
        image_token_index=SPECIAL.index("<image>"),
        tie_word_embeddings=True,
    )


def make_model(seed: int) -> Blip2ForConditionalGeneration:
    """A freshly initialised model in fp32 eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Blip2ForConditionalGeneration(make_config())
        with torch.no_grad():
            model.query_tokens.normal_()  # zeros would keep the queries identical for ever
            for name, parameter in model.vision_model.named_parameters():
                if name.endswith(("class_embedding", "position_embedding")):
                    parameter.normal_(std=INIT)
    return model.eval()


def weights_file(seed: int) -> Path:
    """The path of the shipped weights of one training seed."""
    return HERE / "weights" / f"seed{seed}.safetensors"


def load(seed: int = 0) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """(model in fp32 eval mode, processor) from the shipped fp16 weights of `seed`."""
    model = make_model(seed)
    state = {name: tensor.float() for name, tensor in load_file(weights_file(seed)).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("lm_head.weight")]  # tied to the embeddings, not stored
    if missing or unexpected:
        raise RuntimeError(f"{weights_file(seed)} does not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval(), make_processor()


def image_states(model: Blip2ForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The Q-Former's outputs [B, QUERY_TOKENS, HIDDEN] of normalised pictures [B, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    patches = model.vision_model(pixel_values=pixels).last_hidden_state
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    return model.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
