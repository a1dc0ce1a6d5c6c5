"""The second model's layout with a tiny random language model and the emoji world's tokenizer."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.quality.emoji import model as tiny
from bench.quality.smollm import model, vision
from unike_kernels.minigpt4 import MiniGPT4


def make_tokenizer() -> Any:
    """The emoji world's."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tiny.TOKENIZER_FILE), bos_token="<pad>", eos_token="</s>", pad_token="<pad>"
    )


def make_net(tokenizer: Any) -> MiniGPT4:
    """Five layers of 32 features, the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return model.assemble(vision.MobileNetV2().eval(), LlamaForCausalLM(config).eval(), tokenizer)
