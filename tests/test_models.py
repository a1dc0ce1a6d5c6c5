"""Where the sites of a model are found, whatever surrounds its language model."""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import unike_kernels as uk
from tests.factories import make_edits
from tests.models_tiny import ALWAYS, MODELS, ROUTED, edits_for, make_model, text_inputs
from unike_kernels import models
from unike_kernels.edits import Edits
from unike_kernels.models import (
    Decoder,
    LayerSites,
    UnsupportedModelError,
    find_decoder,
    get_module,
    probe_weights,
    same_weights,
)
from unike_kernels.patching import fingerprint

PATHS = {
    "opt": "model.decoder",
    "llama": "model",
    "qwen3": "model",
    "olmo2": "model",
    "blip2": "language_model.model.decoder",
    "llava": "model.language_model",
}


@pytest.mark.parametrize("name", MODELS)
def test_decoder_and_its_sites(name):
    model = make_model(name)
    decoder = find_decoder(model)
    assert decoder.name == PATHS[name] and len(decoder.layers) == 5
    assert decoder.default_layers() == (1, 2, 3, 4)  # the last four
    gated = name not in ("opt", "blip2")
    for i, sites in enumerate(decoder.layers):
        layer = get_module(model, decoder.layer_name(i))
        assert layer is get_module(model, decoder.name).layers[i]
        assert get_module(model, sites.attention) is layer.self_attn
        ffn = (layer.mlp, layer.mlp) if gated else (layer.fc1, layer.fc2)
        assert (get_module(model, sites.ffn_input), get_module(model, sites.ffn_output)) == ffn
        for field in ("q_proj", "k_proj", "v_proj"):
            assert get_module(model, getattr(sites, field)) is getattr(layer.self_attn, field)
        assert get_module(model, sites.out_proj) is (layer.self_attn.o_proj if gated else layer.self_attn.out_proj)
        assert (sites.q_norm is not None) == (sites.k_norm is not None) == (name in ("qwen3", "olmo2"))
        assert (sites.gated, sites.act) == ((True, "silu") if gated else (False, "relu"))
        assert (sites.hidden_size, sites.ffn_size, sites.heads) == (16, 24, 4)
        assert sites.scaling == pytest.approx(sites.head_dim**-0.5)
    below = decoder.relative()
    assert below.name == "" and below == find_decoder(get_module(model, decoder.name)) == below.relative()


def test_wrappers_do_not_matter():
    """MiniGPT-4 and LAVIS keep their language model under names of their own."""
    for attribute, name in (("llama_model", "llama"), ("opt_model", "opt")):
        wrapper = nn.Module()
        wrapper.visual_encoder = nn.Linear(2, 2)
        setattr(wrapper, attribute, make_model(name))
        assert find_decoder(wrapper).name == f"{attribute}.{PATHS[name]}"
        assert find_decoder(nn.Sequential(wrapper)).name == f"0.{attribute}.{PATHS[name]}"


def test_shallow_model_is_edited_everywhere():
    decoder = find_decoder(make_model("llama", layers=2))
    assert decoder.default_layers() == (0, 1)


_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}}
OTHERS = {
    "Mistral": (_SIZES | {"sliding_window": 4}, "model", {}),
    "Qwen2": (_SIZES, "model", {}),
    "Granite": (_SIZES | {"attention_multiplier": 0.3}, "model", {"scaling": 0.3}),
    "Gemma2": (_SIZES | {"head_dim": 4}, "model", {"softcap": 50.0, "act": "gelu_tanh"}),
    "Gemma3": (
        {
            "text_config": _SIZES | {"head_dim": 4, "sliding_window": 4},
            "vision_config": _VISION,
            "image_token_index": 3,
        },
        "model.language_model",
        {"act": "gelu_tanh"},
    ),
    "PaliGemma": (
        {
            "text_config": _SIZES | {"model_type": "gemma", "head_dim": 4},
            "vision_config": _VISION | {"model_type": "siglip_vision_model"},
            "image_token_index": 3,
            "projection_dim": 16,
        },
        "model.language_model",
        {"act": "gelu_tanh"},
    ),
    "Qwen2_5_VL": (
        {
            "text_config": _SIZES | _ROPE,
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": 3,
        },
        "model.language_model",
        {},
    ),
    "SmolVLM": (
        {
            "text_config": _SIZES | {"model_type": "llama"},
            "vision_config": _VISION,
            "image_token_id": 3,
            "scale_factor": 1,
        },
        "model.text_model",
        {},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_of_transformers(name):
    """Found, edited, and bit for bit the base again; padded rows as alone, with the masks that each family makes."""
    config, path, expected = OTHERS[name]
    kind = "ForCausalLM" if path == "model" else "ForConditionalGeneration"
    model = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**config)).eval()
    decoder = find_decoder(model)
    assert decoder.name == path
    assert all(getattr(decoder.layers[0], field) == value for field, value in expected.items())
    inputs = text_inputs([6, 4])
    row = text_inputs([inputs["input_ids"][1, 2:].tolist()])
    base, base_row = model(**inputs).logits, model(**row).logits
    edits = edits_for(model, n_cases=None, layers=(1, 2))
    with uk.patch(model, edits) as handle:
        edited = model(**inputs).logits
        alphas = [d.alpha[1] for d in handle.record.runtime.tracker.current.state.layers.values()]
        model(**row)
        alone = [d.alpha[0] for d in handle.record.runtime.tracker.current.state.layers.values()]
        tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokens.shape[0] == 2 and (edited - base).abs().max() > 1e-2
    if (base[1, 2:] - base_row[0]).abs().max() < 1e-3:  # PaliGemma itself answers otherwise beside padding
        torch.testing.assert_close(alphas, alone, rtol=1e-3, atol=1e-4)
    else:
        assert name == "PaliGemma"
    assert torch.equal(model(**inputs).logits, base)


# ------------------------------------------------------------------------------------------------- what is refused

NORMED = {
    "StableLm": ({"qk_layernorm": True}, "besides q_norm and k_norm: q_layernorm, k_layernorm"),
    "HunYuanDenseV1": ({"head_dim": 4}, "besides q_norm and k_norm: query_layernorm, key_layernorm"),
}


@pytest.mark.parametrize("name", NORMED)
def test_attention_with_norms_of_other_names_is_refused(name):
    more, said = NORMED[name]
    config = getattr(transformers, f"{name}Config")(**_SIZES, **more)
    with pytest.raises(UnsupportedModelError, match=said):
        find_decoder(getattr(transformers, f"{name}ForCausalLM")(config))


def test_attention_with_a_norm_on_v_or_without_projections_of_its_own_is_refused():
    """Gemma 4: v has a norm without weights, and some layers take keys and values, or the values, from elsewhere."""
    model = make_model("llama")
    attention = model.model.layers[4].self_attn
    attention.v_norm = nn.RMSNorm(4, elementwise_affine=False)
    with pytest.raises(UnsupportedModelError, match="besides q_norm and k_norm: v_norm"):
        find_decoder(model)
    del attention.v_norm, attention.v_proj
    with pytest.raises(UnsupportedModelError, match="LlamaAttention has no v_proj of its own"):
        find_decoder(model)


def test_no_decoder_and_several():
    with pytest.raises(
        uk.UnsupportedModelError, match=r"Linear has no decoder of a known family. Known families: llama"
    ):
        find_decoder(nn.Linear(2, 2))
    with pytest.raises(uk.UnsupportedModelError, match=r"several decoders \(0.model, 1.model.decoder\)"):
        find_decoder(nn.Sequential(make_model("llama"), make_model("opt")))
    empty = nn.Module()
    empty.layers = nn.ModuleList()
    with pytest.raises(uk.UnsupportedModelError, match="no decoder of a known family"):
        find_decoder(empty)
    mixed = make_model("llama")
    mixed.model.layers[1].mlp = nn.Linear(16, 16)  # as a mixture of experts in one layer
    with pytest.raises(uk.UnsupportedModelError, match="no decoder of a known family"):
        find_decoder(mixed)


class Swoosh(nn.Module):
    pass


def test_activations():
    model = make_model("llama")
    for act, name in (
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.functional.relu, "relu"),
        (nn.Identity(), "identity"),
    ):
        for layer in model.model.layers:
            layer.mlp.__dict__.pop("act_fn", None)
            layer.mlp._modules.pop("act_fn", None)
            layer.mlp.act_fn = act
        assert {sites.act for sites in find_decoder(model).layers} == {name}
    del model.model.layers[2].mlp.act_fn
    model.model.layers[2].mlp.act_fn = Swoosh()
    with pytest.raises(
        uk.UnsupportedModelError, match=r"no decoder of a known family \(model: unknown activation 'Swoosh'"
    ):
        find_decoder(model)


def test_activations_are_the_ones_that_the_model_computes():
    x = torch.linspace(-3, 3, 50)
    for name, act in transformers.activations.ACT2FN.items():
        if type(act).__name__ in models.ACT_OF:
            ours = uk.reference.activation(models._activation(act))
            torch.testing.assert_close(ours(x), act(x), msg=name)


def test_get_module_names_the_class():
    with pytest.raises(uk.UnsupportedModelError, match="Linear has no module 'a.b'"):
        get_module(nn.Linear(2, 2), "a.b")


# ----------------------------------------------------------------------------------------------------------- probes


def test_probe_tells_checkpoints_apart_in_any_precision():
    first, second = make_model("opt"), make_model("opt", seed=1)
    decoder = find_decoder(first)
    layers = decoder.default_layers()
    probe = probe_weights(first, decoder, layers)
    assert len(probe) == 32 and len(set(probe)) > 20
    assert not same_weights(probe, probe_weights(second, decoder, layers))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert same_weights(probe, probe_weights(make_model("opt", dtype=dtype), decoder, layers))
    small = [w + 1e-3 * abs(w) for w in probe]
    assert same_weights(probe, small) and not same_weights(probe, [w * 1.1 for w in probe])


def test_weights_that_cannot_be_read_give_no_probe():
    model = make_model("llama")
    decoder = find_decoder(model)
    whole = probe_weights(model, decoder, (1, 2))
    model.model.layers[1].to("meta")
    part = probe_weights(model, decoder, (1, 2))
    assert part == whole[8:] and same_weights(whole, part)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        getattr(model.model.layers[2].mlp, projection).to(torch.float8_e4m3fn)
    assert probe_weights(model, decoder, (1, 2)) == ()


# ---------------------------------------------------------------------------------------------- a family of one's own


class StrangeAttention(nn.Module):
    """Single-head attention with names of its own, and a tuple KV cache as transformers before 4.36 had it."""

    def __init__(self, d):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, hidden_states, past=None):
        q, k, v = (w(hidden_states)[:, None] for w in (self.wq, self.wk, self.wv))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return self.wo(nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, 0]), (k, v)


class StrangeLayer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn, self.up, self.down = StrangeAttention(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, hidden_states, past=None):
        out, present = self.attn(self.norm1(hidden_states), past)
        hidden_states = hidden_states + out
        return hidden_states + self.down(nn.functional.gelu(self.up(self.norm2(hidden_states)))), present


class StrangeDecoder(nn.Module):
    def __init__(self, d=8, n=2):
        super().__init__()
        self.embed = nn.Embedding(30, d)
        self.layers = nn.ModuleList(StrangeLayer(d) for _ in range(n))

    def forward(self, input_ids, past_key_values=None):
        hidden, presents = self.embed(input_ids), ()
        for i, layer in enumerate(self.layers):
            hidden, present = layer(hidden, past_key_values[i] if past_key_values else None)
            presents += (present,)
        return hidden, presents


class StrangeModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = StrangeDecoder()

    def forward(self, input_ids, past_key_values=None):
        hidden, presents = self.decoder(input_ids, past_key_values)
        return hidden @ self.decoder.embed.weight.T, presents

    @staticmethod
    def _reorder_cache(past, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past)


def strange(layer):
    if not isinstance(layer, StrangeLayer):
        return None
    return LayerSites(
        attention="attn",
        ffn_input="up",
        ffn_output="down",
        gated=False,
        act="gelu",
        q_proj="attn.wq",
        k_proj="attn.wk",
        v_proj="attn.wv",
        out_proj="attn.wo",
        hidden_size=layer.up.in_features,
        ffn_size=layer.up.out_features,
        heads=1,
        kv_heads=1,
        head_dim=layer.up.in_features,
        scaling=layer.up.in_features**-0.5,
    )


def strange_edits(model, decoder, config=ALWAYS) -> Edits:
    config = replace(config, layers=(0, 1))
    return make_edits(3, 8, (0, 1), base=fingerprint(model, decoder, (0, 1)), config=config)


@pytest.fixture
def strange_model():
    return StrangeModel().eval()


def test_family_of_ones_own(strange_model, monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    with pytest.raises(uk.UnsupportedModelError):
        find_decoder(strange_model)
    models.register_family("strange")(strange)
    decoder = find_decoder(strange_model)
    assert (decoder.family, decoder.name) == ("strange", "decoder")
    ids = torch.randint(0, 30, (2, 5))
    base = strange_model(ids)[0]
    edits = strange_edits(strange_model, decoder)
    assert edits.base.family == "strange"
    with uk.patch(strange_model, edits) as handle:
        edited = strange_model(ids)[0]
        assert handle.explain(input_ids=ids)[1].layers[1].items
    assert not torch.equal(edited, base) and torch.equal(strange_model(ids)[0], base)
    monkeypatch.setattr(models, "FAMILIES", {})
    by_hand = Decoder(
        "strange",
        "decoder",
        tuple(strange(x).below(f"decoder.layers.{i}") for i, x in enumerate(strange_model.decoder.layers)),
    )
    with uk.patch(strange_model, edits, sites=by_hand):
        assert torch.equal(strange_model(ids)[0], edited)


def test_decisions_follow_tuple_caches(strange_model, monkeypatch):
    """transformers before 4.36, as LAVIS and MiniGPT-4 need it: a new tuple of new tensors after every step."""
    monkeypatch.setattr(models, "FAMILIES", {"strange": strange})
    model, names = strange_model, set(strange_model.__dict__)
    edits = strange_edits(model, find_decoder(model), ROUTED)
    ids = torch.randint(0, 30, (2, 5))
    with torch.no_grad(), uk.patch(model, edits, name="one", routing="always") as one:
        two = uk.patch(model, edits, name="two", routing="always")
        assert "_reorder_cache" in model.__dict__
        tracker = one.record.runtime.tracker
        expected = [model(ids[i : i + 1]) for i in range(2)]
        decided = [expected[i][1] for i in range(2)]
        together, cache = model(ids)
        alpha = tracker.current.state.layers[1].alpha
        torch.testing.assert_close(together[0], expected[0][0][0], rtol=1e-4, atol=1e-4)
        for row in (1, 0):  # two sequences take turns
            _, decided[row] = model(torch.tensor([[7]]), decided[row])
            torch.testing.assert_close(tracker.current.state.layers[1].alpha[0], alpha[row])
        cache = model._reorder_cache(cache, torch.tensor([0, 1]))
        step, cache = model(torch.tensor([[7], [7]]), cache)
        assert torch.equal(tracker.current.state.layers[1].alpha, alpha) and tracker.current.decided
        foreign = StrangeModel._reorder_cache(cache, torch.tensor([0, 1]))  # behind the patch's back
        with pytest.raises(ValueError, match="ran without this patch"):
            model(torch.tensor([[7], [7]]), foreign)
        two.remove()
        assert "_reorder_cache" in model.__dict__  # the other patch still needs it
        model(torch.tensor([[7], [7]]), model._reorder_cache(cache, torch.tensor([1, 0])))
        assert tracker.current.decided
    assert set(model.__dict__) == names


def test_registering_says_nothing_about_other_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert strange(nn.Linear(2, 2)) is None
        assert models.opt(nn.Linear(2, 2)) is None and models.llama(StrangeLayer(8)) is None
