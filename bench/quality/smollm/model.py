"""MiniGPT-4 in miniature with a real language model: MobileNetV2, a Q-Former, one projection, SmolLM2-135M-Instruct.

Vision tower and language model are public weights and stay as they are (`fetch.py`); "the projector" is what lies
between: ln_vision, the Q-Former with its queries, and llama_proj. It is what `train.py` trains, and all that the
repository ships.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unike_kernels.minigpt4 import IMAGE, MiniGPT4, MiniGPT4Processor

from . import fetch, vision

HERE = Path(__file__).parent
QUERY_TOKENS = 5  # image tokens per picture: four start as a name's tokens, one as its kind's first
QFORMER = 256  # width of the Q-Former
# The picture stands where an answer would: the words of 24 names in its place, with nothing trained, were repeated by
# the language model 23 times after "what is this?", and not once where the picture came first.
BEFORE = "Question: what is this? Answer:"
TEMPLATE = f"{BEFORE}{IMAGE}\n{{}}"  # the emoji world's prompts bring their own "Question: ... Answer:"
END = "\n"  # what the language model writes after a text-only answer
TRAINED = ("ln_vision", "Qformer", "query_tokens", "llama_proj")


class MissingWeights(RuntimeError):
    """The public weights, or the shipped projector, are not on this machine."""


def make_qformer(layers: int = 2) -> nn.Module:
    """transformers' Q-Former without text: QFORMER wide, cross-attention to the patches in every layer."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        vocab_size=1,
        hidden_size=QFORMER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * QFORMER,
        encoder_hidden_size=vision.WIDTH,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=8,
        initializer_range=0.05,
    )
    return Blip2QFormerModel(config)


def assemble(visual_encoder: nn.Module, language: nn.Module, tokenizer: Any, seed: int = 0) -> MiniGPT4:
    """The whole model with a fresh projector, in eval mode; only the projector asks for gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = language.get_input_embeddings().weight.shape[1]
        queries = nn.Parameter(torch.randn(1, QUERY_TOKENS, QFORMER))
        # wide in the middle: a linear map of 256 directions cannot reach the embeddings, which fill 576
        projection = nn.Sequential(nn.Linear(QFORMER, 4 * QFORMER), nn.GELU(), nn.Linear(4 * QFORMER, width))
        parts = (visual_encoder, nn.LayerNorm(vision.WIDTH), make_qformer(), queries)
        model = MiniGPT4(*parts, language, tokenizer, projection, end_sym=END)
    model.requires_grad_(False)
    for name in TRAINED:
        getattr(model, name).requires_grad_(True)
    return model.eval()


def make_processor(tokenizer: Any) -> MiniGPT4Processor:
    """Pictures and questions to the model's inputs."""
    return MiniGPT4Processor(vision.make_image_processor(), tokenizer, QUERY_TOKENS, TEMPLATE)


def load_language(cache: Path = fetch.CACHE) -> tuple[nn.Module, Any]:
    """(SmolLM2-135M-Instruct in fp32, its tokenizer); MissingWeights without them."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    _need(cache)
    folder = cache / fetch.LANGUAGE_FOLDER
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def load_vision(cache: Path = fetch.CACHE) -> vision.MobileNetV2:
    """MobileNetV2 with ImageNet's weights, fp32, eval mode."""
    _need(cache)
    tower = vision.MobileNetV2()
    tower.load_state_dict(load_file(cache / fetch.VISION_FILE))
    return tower.eval()


def weights_file(seed: int = 0) -> Path:
    """Where the shipped projector of one training seed lies."""
    return HERE / "weights" / f"projector{seed}.safetensors"


def load(seed: int = 0, cache: Path = fetch.CACHE, *, trained: bool = True) -> tuple[MiniGPT4, MiniGPT4Processor]:
    """(model in fp32 eval mode, processor), with the shipped projector or (trained=False) a fresh one."""
    language, tokenizer = load_language(cache)
    model = assemble(load_vision(cache), language, tokenizer, seed)
    if trained:
        if not weights_file(seed).exists():
            raise MissingWeights(f"there is no {weights_file(seed).name}: python -m bench.quality.smollm.train")
        load_projector(model, weights_file(seed))
    return model, make_processor(tokenizer)


def projector_state(model: MiniGPT4) -> dict[str, Tensor]:
    """What is trained, by name."""
    return {name: t.detach() for name, t in model.state_dict().items() if name.split(".")[0] in TRAINED}


def load_projector(model: MiniGPT4, path: Path) -> None:
    """Takes over a saved projector; ValueError where it does not fit."""
    state = {name: t.float() for name, t in load_file(path).items()}
    differing = sorted(projector_state(model).keys() ^ state.keys())
    if differing:
        raise ValueError(f"{path} does not fit this model's projector: {', '.join(differing)}")
    model.load_state_dict(state, strict=False)


def see(model: MiniGPT4, patches: Tensor) -> Tensor:
    """The Q-Former's outputs [B, QUERY_TOKENS, QFORMER] of patches [B, P, WIDTH]: the middle of `encode_img`."""
    seen = model.ln_vision(patches)
    queries = model.query_tokens.expand(len(seen), -1, -1)
    return model.Qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state


def _need(cache: Path) -> None:
    why = fetch.missing(cache)
    if why is not None:
        raise MissingWeights(why)
