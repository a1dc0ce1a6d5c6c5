"""Tiny random models of every family, and random edits that fit them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.factories import make_edits
from unike_kernels.config import RoutingConfig, ShiftConfig, UnikeConfig
from unike_kernels.edits import Edits
from unike_kernels.models import find_decoder, get_module
from unike_kernels.patching import fingerprint

VOCABULARY, WIDTH, LAYERS, HEADS = 40, 16, 5, 4
PAD, IMAGE = 0, 3  # token ids; text uses ids above 3
QUERY_TOKENS = 4  # image tokens of the BLIP-2 and the LLaVA below

_STD = 0.25  # far from a trained model's: large enough that every part of a tiny model changes what it says


def _text(layers: int, **more: Any) -> dict[str, Any]:
    special = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": layers, **special, **more}


def _opt_config(layers: int) -> OPTConfig:
    return OPTConfig(
        **_text(
            layers,
            ffn_dim=24,
            num_attention_heads=HEADS,
            word_embed_proj_dim=WIDTH,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=_STD,
        )
    )


def _llama_config(layers: int) -> LlamaConfig:
    sizes = _text(layers, intermediate_size=24, num_attention_heads=HEADS, num_key_value_heads=2)
    return LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=_STD)


def _opt(layers: int) -> nn.Module:
    return OPTForCausalLM(_opt_config(layers))


def _llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(_llama_config(layers))


def _qwen3(layers: int) -> nn.Module:
    sizes = _text(layers, intermediate_size=24, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, max_position_embeddings=64, initializer_range=_STD))


def _olmo2(layers: int) -> nn.Module:
    sizes = _text(layers, intermediate_size=24, num_attention_heads=HEADS, num_key_value_heads=2)
    return Olmo2ForCausalLM(Olmo2Config(**sizes, max_position_embeddings=64, initializer_range=_STD))


def _blip2(layers: int) -> nn.Module:
    small = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4, "initializer_range": _STD},
        qformer_config={
            **small,
            "vocab_size": 1,
            "encoder_hidden_size": WIDTH,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 8,
            "initializer_range": _STD,
        },
        text_config=_opt_config(layers).to_dict(),
        num_query_tokens=QUERY_TOKENS,
        image_token_index=IMAGE,
    )
    model = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)
    return model


def _llava(layers: int) -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(layers),
        image_token_index=IMAGE,
        image_seq_length=QUERY_TOKENS,
        pad_token_id=PAD,
    )
    return LlavaForConditionalGeneration(config)


MODELS = {"opt": _opt, "llama": _llama, "qwen3": _qwen3, "olmo2": _olmo2, "blip2": _blip2, "llava": _llava}
TEXT = ("opt", "llama", "qwen3")
MULTIMODAL = ("blip2", "llava")


def make_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """A random model in evaluation mode; equal names and seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name](layers)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name and parameter_name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)  # fresh norms are all ones, and would hide a norm that was left out
                elif parameter_name.endswith("bias"):
                    parameter.normal_(std=_STD)
    return model.to(dtype).eval()


def text_inputs(rows: Sequence[int] | Sequence[Sequence[int]], *, side: str = "left", seed: int = 0) -> dict[str, Any]:
    """input_ids and attention_mask [B, S] of padded rows: given token ids, or lengths of random rows."""
    generator = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(4, VOCABULARY, (row,), generator=generator) if isinstance(row, int) else torch.tensor(row)
        for row in rows
    ]
    length = max(map(len, texts))
    ids = torch.full((len(texts), length), PAD)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        at = length - len(text) if side == "left" else 0
        ids[i, at : at + len(text)] = text
        mask[i, at : at + len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_for(
    model: nn.Module, rows: Sequence[int] | Sequence[Sequence[int]], *, side: str = "left", seed: int = 0
) -> dict[str, Any]:
    """`text_inputs` with a random picture and its image tokens before every row's text, if the model looks at any."""
    inputs = text_inputs(rows, side=side, seed=seed)
    if not hasattr(model.config, "vision_config"):
        return inputs
    texts = [ids[mask != 0].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    inputs = text_inputs([[IMAGE] * QUERY_TOKENS + text for text in texts], side=side)
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(len(texts), 3, 8, 8, generator=generator)
    return {**inputs, "pixel_values": pictures.to(model.dtype)}


def row_of(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a padded batch, alone and without its padding."""
    real = inputs["attention_mask"][row] != 0
    out = {"input_ids": inputs["input_ids"][row][real][None], "attention_mask": torch.ones(1, int(real.sum())).long()}
    if "pixel_values" in inputs:
        out["pixel_values"] = inputs["pixel_values"][row][None]
    return out


@torch.no_grad()
def case_taps(model: nn.Module, inputs: dict[str, Any], layers: Sequence[int]) -> dict[int, Tensor]:
    """{layer: [B, d]} what enters the self-attention at each row's last attended token, of the model as it stands."""
    decoder, kept, hooks = find_decoder(model), {}, []
    for layer in layers:

        def keep(module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
            kept[layer] = args[0] if args else kwargs["hidden_states"]

        attention = get_module(model, decoder.layers[layer].attention)
        hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    mask = inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
    return {layer: tap[torch.arange(len(last)), last].cpu() for layer, tap in kept.items()}


SHIFT = ShiftConfig(k=4, clamp=False)  # not clamped: half of a random model's alphas would be 0 and test nothing
ALWAYS = UnikeConfig(shift=SHIFT)
ROUTED = UnikeConfig(shift=SHIFT, routing=RoutingConfig(mode="routed", false_accept_rate=0.0))


def edits_for(
    model: nn.Module,
    config: UnikeConfig = ALWAYS,
    *,
    prompts: dict[str, Any] | None = None,
    n_edits: int = 3,
    layers: Sequence[int] | None = None,
    **more: Any,
) -> Edits:
    """Random edits for the last layers of `model`, strong enough to change what it says.

    prompts: model inputs whose row e is the question of edit e, so that its own item and its router find it.
    more: as `make_edits` takes it.
    """
    decoder = find_decoder(model)
    layers = tuple(decoder.default_layers() if layers is None else layers)
    if prompts is not None:
        n_edits = len(prompts["input_ids"])
    edits = make_edits(
        n_edits,
        decoder.layers[0].hidden_size,
        layers,
        decoder.layers[0].gated,
        base=fingerprint(model, decoder, layers),
        config=replace(config, layers=layers),
        **{"n_items": 6, "n_cases": 64, **more},
    )
    taps = {} if prompts is None else case_taps(model, prompts, layers)
    for layer, tap in taps.items():
        edits.layers[layer].h_sem = tap.to(edits.layers[layer].h_sem.dtype)
    for shared in edits.shared.values():  # encoders that neither shrink nor blow up
        shared.encoder = tuple((weight / len(bias) ** 0.5, bias / 10) for weight, bias in shared.encoder)
    if edits.calibration is not None:  # on questions of no edit, as the router needs it
        others = inputs_for(model, [3 + i % 5 for i in range(len(edits.calibration.cases))], seed=1)
        others = {name: value.to(next(model.parameters()).device) for name, value in others.items()}
        edits.calibration.cases = case_taps(model, others, layers[:1])[layers[0]].to(edits.calibration.cases.dtype)
        edits.calibration.center = edits.calibration.cases.mean(dim=0)
    edits.validate()
    return edits


def skip_where_models_do_not_compile() -> None:
    """Skips a test of torch.compile where the compiler cannot read transformers' own model: torch 2.6 cannot."""
    if not _compiles():
        pytest.skip(f"torch {torch.__version__} does not compile transformers' own models, without a patch on them")


@lru_cache
def _compiles() -> bool:
    model = make_model("llama", layers=1)
    try:
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(**inputs_for(model, (3,)), use_cache=False)
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True
