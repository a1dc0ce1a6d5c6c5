"""What a patch takes from a model and a caller as it finds it: default dtypes, modes, threads, writes and choices."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

pytest.importorskip("transformers")

import unike_kernels as uk
from tests.models_tiny import _STD, ALWAYS, ROUTED, _text, edits_for, inputs_for, make_model
from unike_kernels import native, ops, reference
from unike_kernels.models import UnsupportedModelError


@pytest.mark.skipif(native.cpu() is None, reason=f"only C++ writes to addresses: {native.no_cpu()}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_decides_nothing_in_a_search(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, 32, generator=generator)
    q = torch.randn(6, 32, generator=generator)
    index = native.Int8Index(keys)
    torch.set_default_dtype(dtype)
    try:
        for k in (1, 5, 40):
            for _ in range(5):
                scores, found = index.search(q, k)
            assert scores.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    wanted, indices = reference.cosine_topk(q, keys, 40)
    assert torch.equal(found, indices)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)


def differentiate(how: str, f: Any, x: torch.Tensor) -> Any:
    if how == "hessian":
        return torch.autograd.functional.hessian(f, x)
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(y), y, create_graph=True)
    penalty = first.square().sum() + f(y)
    if how == "grad":
        return torch.autograd.grad(penalty, y)
    return penalty.backward(inputs=[y]) if how == "backward of inputs" else penalty.backward()


@pytest.mark.parametrize("how", ["hessian", "grad", "backward of inputs", "backward"])
def test_a_second_derivative_is_refused_however_it_is_asked_for(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, keys, values = (torch.randn(*shape, generator=generator) for shape in ((2, 8), (5, 8), (5, 8)))
    with pytest.raises(RuntimeError, match="extra_neurons is differentiable once; unike_kernels.reference has all"):
        differentiate(how, lambda x: ops.extra_neurons(x, keys, None, values, act="gelu").sum(), x)
    with pytest.raises(RuntimeError, match="differentiable once"):  # by what it is linear in, with gradients coming in
        weight = torch.ones((), requires_grad=True)
        y = x.clone().requires_grad_()
        loss = weight * ops.extra_neurons(y, keys, None, values, act="gelu").sum()
        (first,) = torch.autograd.grad(loss, y, create_graph=True)
        torch.autograd.grad(first.sum(), weight)
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(ops.extra_neurons(y, keys, None, values, act="gelu").sum(), y, create_graph=True)
    (plain,) = torch.autograd.grad((torch.nn.functional.gelu(y @ keys.T) @ values).sum(), y)
    torch.testing.assert_close(first, plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_query_that_the_layer_writes_to_is_not_used(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    from transformers.models.llama import modeling_llama

    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    uk.patch(model, edits_for(model, ALWAYS, prompts=inputs))
    plain = modeling_llama.apply_rotary_pos_emb

    def in_place(q: torch.Tensor, k: torch.Tensor, *args: Any, **kw: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rotated = plain(q, k, *args, **kw)
        q.data.copy_(rotated[0])  # as a kernel writes, which torch does not see
        return rotated

    with mode():
        wanted = copy.deepcopy(model)(**inputs).logits
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_clips_its_heads_is_refused() -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    sizes = _text(5, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    options = {"max_position_embeddings": 64, "initializer_range": _STD}
    clipped = OlmoForCausalLM(OlmoConfig(**sizes, **options, clip_qkv=0.5)).eval()
    with pytest.raises(UnsupportedModelError, match=r"OlmoAttention clips its queries, .* \(clip_qkv 0.5\)"):
        uk.patch(clipped, edits_for(OlmoForCausalLM(OlmoConfig(**sizes, **options)).eval()))


def test_an_adapters_dropout_is_not_kept_with_the_items() -> None:
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model, ROUTED, prompts=inputs)
    options = {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.5, "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))  # in training mode, dropout and all
    dropouts = [m for m in adapted.modules() if isinstance(m, nn.Dropout) and m.training]
    assert dropouts
    handle = uk.patch(adapted, edits)
    assert all(m.training for m in dropouts)
    adapted.eval()
    with torch.no_grad():
        before = adapted(**inputs).logits
        handle.refresh()
        assert torch.equal(adapted(**inputs).logits, before)


def test_a_second_thread_is_refused_before_the_decoder_too() -> None:
    model = make_model("blip2")
    inputs = inputs_for(model, (6,))
    uk.patch(model, edits_for(model, ALWAYS, prompts=inputs))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with torch.no_grad():
        alone = model(**inputs, labels=labels).logits
    inside, go_on, told = threading.Event(), threading.Event(), []

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread().name == "first":
            inside.set()
            assert go_on.wait(20)

    vision = next(m for n, m in model.named_modules() if n.endswith("vision_model"))
    vision.register_forward_pre_hook(wait)

    def first() -> None:
        with torch.no_grad():
            told.append(model(**inputs, labels=labels).logits)

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert inside.wait(20)
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match="another thread is within a pass of this model"):
            model(**inputs)
    finally:
        go_on.set()
        thread.join()
    assert torch.equal(told[0], alone)  # its labels are still its own
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).logits, alone)


@torch.no_grad()
def test_edits_chosen_for_cases_that_were_decided_otherwise_are_refused() -> None:
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    edits = edits_for(model, ROUTED, prompts=inputs)
    handle = uk.patch(model, edits)
    token = torch.tensor([[7], [8]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)

    def step(cache: Any) -> torch.Tensor:
        return model(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits

    routed = model(**inputs, use_cache=True).past_key_values
    plain = step(routed)
    with handle.choosing([None, None]), pytest.raises(ValueError, match="decided before, without a choice"):
        step(routed)
    assert torch.equal(step(routed), plain)
    with handle.choosing([None, edits.ids[0]]):
        chosen = model(**inputs, use_cache=True).past_key_values
        inside = step(chosen)
    assert torch.equal(step(chosen), inside)  # what was chosen goes on
    with handle.choosing([None, edits.ids[0]]):
        assert torch.equal(step(chosen), inside)
    with handle.choosing([None] * 5), pytest.raises(ValueError, match="chosen for 5 rows, but .* 2 cases"):
        step(chosen)


def test_nothing_is_explained_by_an_earlier_pass() -> None:
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, skip: bool = False, **inputs: Any) -> Any:
            return None if skip else self.model(**inputs)

    outer = Sometimes()
    handle = uk.patch(outer, edits_for(model, ROUTED, prompts=inputs))
    assert len(handle.explain(**inputs)) == 2
    with pytest.raises(RuntimeError, match="nothing to explain"):
        handle.explain(skip=True, **inputs)


def test_a_forward_of_linear_that_a_library_replaced_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    inputs = inputs_for(model, (5, 3))
    handle = uk.patch(model, edits_for(model, ROUTED, prompts=inputs))
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * plain(self, x))
    with torch.no_grad():
        with handle.disabled():
            base = model(**inputs).logits
        edited = model(**inputs).logits
        handle.remove()
        assert torch.equal(base, model(**inputs).logits) and not torch.equal(edited, base)


def test_a_forward_mode_derivative_is_refused_while_decoding() -> None:
    """Native code is called past torch's operators there; a tangent must not get lost on the way."""
    model = make_model("llama")
    model.set_attn_implementation("eager")
    inputs = inputs_for(model, (5,))
    uk.patch(model, edits_for(model, ALWAYS, prompts=inputs))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        cache = model(inputs_embeds=embeds[:, :-1], use_cache=True).past_key_values
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            step = forward_ad.make_dual(embeds[:, -1:], torch.ones_like(embeds[:, -1:]))
            model(inputs_embeds=step, past_key_values=cache)
