"""A decoder that takes its picture apart from its tokens, as LAVIS's OPT does (LAVIS itself: tests/lavis)."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoder

import unike_kernels as uk
from tests.factories import make_edits
from unike_kernels.models import find_decoder
from unike_kernels.patching import fingerprint

WIDTH = 16


class PictureFirst(OPTDecoder):
    """Puts query_embeds [B, Q, d] before the embedded tokens."""

    def forward(self, input_ids=None, attention_mask=None, query_embeds=None, **kw):
        embeds = torch.cat([query_embeds, self.embed_tokens(input_ids)], dim=1)
        return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **kw)


@pytest.mark.parametrize("routing", ["always", "routed"])
def test_picture_embeddings_count_as_tokens(routing):
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 24, "vocab_size": 40}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=4, num_attention_heads=2, **sizes)).double().eval()
    found = find_decoder(model)
    layers = found.default_layers()
    base = fingerprint(model, found, layers)
    edits = make_edits(d=WIDTH, layers=layers, base=base, dtype=torch.float64, n_cases=0)
    decoder = model.model.decoder
    ids, picture = torch.randint(3, 40, (2, 5)), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, -2:] = 0
    with uk.patch(model, edits, routing=routing):
        whole = torch.cat([picture, decoder.embed_tokens(ids)], dim=1)
        expected = decoder(inputs_embeds=whole, attention_mask=mask).last_hidden_state
    decoder.__class__ = PictureFirst
    with uk.patch(model, edits, routing=routing):
        out = decoder(input_ids=ids, attention_mask=mask, query_embeds=picture).last_hidden_state
    assert torch.equal(out, expected)
