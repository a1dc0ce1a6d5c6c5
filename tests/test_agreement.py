"""What editing takes from a model is what the model itself says, or the model is refused before anything is made."""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers

import unike_kernels as uk
from tests.editing_tiny import (
    QUESTIONS,
    TARGETS,
    answers,
    make_processor,
    make_requests,
    make_tokenizer,
    make_triplets,
    routed,
)
from tests.models_tiny import VOCABULARY, make_model
from tests.test_models import OTHERS
from unike_kernels.editing.agreement import check_agreement
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.editing.prefix import logits_step, run_prefix, run_tail
from unike_kernels.models import find_decoder

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
    "max_position_embeddings": 64,
}
OPT_LIKE = {"vocab_size": VOCABULARY, "d_model": 16, "ffn_dim": 24, "num_layers": 4, "attention_heads": 4}
SCALED = {
    "Granite": SIZES | {"logits_scaling": 8.0},
    "Cohere": SIZES | {"logit_scale": 0.0625},
    "Gemma2": SIZES | {"head_dim": 4, "final_logit_softcapping": 2.0},
    "XGLM": OPT_LIKE | {"init_std": 0.25},
}


def language_model(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SCALED[name])).eval()
    with torch.no_grad():
        for part, p in model.named_parameters():
            if "norm" in part:  # as initialised a norm is none: one left out would not show
                torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", SCALED)
def test_logits_of_the_layers_and_the_head_are_the_models_own(name: str) -> None:
    model = language_model(name)
    decoder = find_decoder(model)
    collator = Collator(model, make_processor("llama"))
    batch = collator.batch([Sample(QUESTIONS[0], TARGETS[0]), Sample(QUESTIONS[1], TARGETS[1])], [0, 1])
    with torch.no_grad():
        theirs = model(**batch.inputs, use_cache=False).logits
        ours = logits_step(model, decoder)(run_tail(model, decoder, run_prefix(model, decoder, batch, 2)))
    real = batch.inputs["attention_mask"] != 0
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def test_an_edits_loss_is_that_of_scaled_logits() -> None:
    model = language_model("Granite")
    editor = uk.Editor(model, make_processor("llama"), replace(routed(), layers=(1, 2)))
    editor.build_memory(make_triplets("llama"), progress=False)
    editor.fit(progress=False)
    (request,) = make_requests("llama", 1)
    edits = editor.edit([request], progress=False)
    batch = editor.collator.batch([Sample(request["prompt"], request["target"])], [0])
    with uk.patch(model, edits, routing="always") as handle, torch.no_grad():
        handle.set_cases(batch.token_to_case(), batch.case_rows())
        logits = model(**batch.inputs).logits[0, :-1]
        handle.set_cases()
    wanted = batch.labels()[0, 1:]
    assert edits.entries[0].loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, wanted)), rel=1e-3)


class PaliGemmaLike:
    """What PaliGemmaProcessor gives: picture tokens, start token, prompt, token types of 0."""

    image_token, image_token_id = "<image>", 3

    def __init__(self) -> None:
        self.tokenizer, self.image_processor = make_tokenizer(), make_processor("blip2").image_processor

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[3] * 4 + self.tokenizer(text.replace("<image>", "").strip())["input_ids"]])
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
        ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "token_type_ids": zeros, "pixel_values": pixels}


def pali_gemma() -> Any:
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(**OTHERS["PaliGemma"][0])
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def with_picture(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e | {"prompt": f"<image> {e['prompt']}"} for e in entries]


def test_paligemma_does_not_see_the_answer() -> None:
    editor = uk.Editor(pali_gemma(), PaliGemmaLike(), replace(routed(), layers=(1, 2)))
    editor.build_memory(with_picture(make_triplets("blip2")), progress=False)
    editor.fit(progress=False)
    requests = with_picture(make_requests("blip2", 4))
    edits = editor.edit(requests, progress=False)
    made = [(r, e) for r, e in zip(requests, edits.entries, strict=True) if e.success]
    assert len(made) >= 3
    for request, _ in made:
        with uk.patch(editor.model, edits.select([request["id"]]), routing="always"):
            assert answers(editor, [request])[0].startswith(request["target"])  # the toy never ends its answers


def test_a_model_that_sees_the_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pali_gemma()
    monkeypatch.setattr(model.config, "model_type", "unknown")  # a family that is like it, and not known to be
    editor = uk.Editor(model, PaliGemmaLike(), replace(routed(), layers=(1, 2)))
    with pytest.raises(ValueError, match="PaliGemma.*logits up to .* it sees the answer"):
        editor.build_memory(with_picture(make_triplets("blip2")), progress=False)
    assert editor.states is None


@pytest.mark.parametrize("name", ["opt", "blip2", "llava"])
def test_what_lies_behind_the_head_and_is_not_known_is_refused(name: str) -> None:
    model = make_model(name)
    editor = uk.Editor(model, make_processor(name), routed())

    def louder(module: Any, args: Any, output: Any) -> Any:
        output.logits = 3 * output.logits
        return output

    with model.register_forward_hook(louder), pytest.raises(ValueError, match="layers of .* from 2 on and its head"):
        editor.build_memory(make_triplets(name), progress=False)
    editor.build_memory(make_triplets(name), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["opt", "blip2", "llava", "llama"])
def test_known_models_agree_in_every_precision(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype=dtype)
    collator, decoder = Collator(model, make_processor(name)), find_decoder(model)
    for entry in [*make_triplets(name, 6), {"prompt": QUESTIONS[1], "target": TARGETS[2]}]:
        check_agreement(collator, decoder, 2, Sample(entry["prompt"], entry["target"], entry.get("image")))


def test_a_decoder_without_a_head_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no lm_head around"):
        uk.Editor(make_model("llama").model, make_processor("llama"), routed())
