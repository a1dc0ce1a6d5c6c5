"""LAVIS's own Blip2OPT class with tiny random weights, built without a download.

Only what fetches files is replaced, and only while the model is built: tokenizers, the ViT's size, the two language
models' weights. Packages that LAVIS imports and this model never uses are stubs, so they need not be installed.
"""

import importlib.machinery
import importlib.util
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import transformers
from torch import nn

WIDTH, VOCAB, QUERIES, PIXELS = 32, 100, 4, 28
PAD, BOS, EOS = 1, 2, 3
UNUSED = (
    "fairscale.nn.checkpoint.checkpoint_activations",
    "iopath.common.download",
    "iopath.common.file_io",
    "omegaconf",
    "pandas",
    "timm.models.hub",
    "timm.models.layers",
    "timm.models.registry",
    "torchvision.datasets.utils",
)
BARE = ("lavis", "lavis.models")  # their __init__ files import every model, data set and task of LAVIS


class Stub(ModuleType):
    """A module in which every name exists."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> mock.MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class Letters:
    """A tokenizer by character, with as much of transformers' interface as Blip2OPT calls."""

    padding_side = "right"
    pad_token_id, bos_token_id, eos_token_id = PAD, BOS, EOS

    def __len__(self) -> int:
        return VOCAB

    def ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """BOS, unless without special tokens, and one id above EOS for each character."""
        return [BOS] * add_special_tokens + [EOS + 1 + ord(c) % (VOCAB - EOS - 1) for c in text]

    def __call__(self, text, return_tensors=None, add_special_tokens=True, max_length=None, **_):
        rows = [self.ids(t, add_special_tokens)[:max_length] for t in ([text] if isinstance(text, str) else text)]
        if return_tensors is None:
            return transformers.BatchEncoding({"input_ids": rows[0] if isinstance(text, str) else rows})
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids != PAD).long()})

    def batch_decode(self, ids, **_) -> list[str]:
        """The ids themselves, as text, so that equal answers are equal tokens."""
        return [" ".join(str(i) for i in row.tolist() if i > EOS) for row in ids]


@cache
def import_lavis() -> tuple[ModuleType, ModuleType]:
    """LAVIS's modules of BLIP-2 and of Blip2OPT."""
    found = importlib.util.find_spec("lavis")
    assert found is not None and found.origin is not None, "LAVIS is not installed; see run.sh"
    root = Path(found.origin).parent
    for name in BARE:
        bare = sys.modules.setdefault(name, ModuleType(name))
        bare.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    for full in UNUSED:
        parts = full.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            stub = sys.modules.setdefault(name, Stub(name))
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    layers = sys.modules["timm.models.layers"]  # these three the ViT does use
    layers.trunc_normal_ = nn.init.trunc_normal_
    layers.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
    layers.drop_path = lambda x, *_: x
    sys.modules["timm.models.registry"].register_model = lambda f: f

    from lavis.models.base_model import BaseModel

    sys.modules["lavis.models"].BaseModel = BaseModel  # where LAVIS's registry looks for it
    from lavis.models.blip2_models import blip2, blip2_opt

    return blip2, blip2_opt


def build(prompt: str = "", layers: int = 5) -> nn.Module:
    """Blip2OPT in eval mode: pictures [B, 3, 28, 28], 4 query tokens, a language model of width 32 in float64."""
    blip2, blip2_opt = import_lavis()
    from lavis.models.eva_vit import VisionTransformer

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "vocab_size": VOCAB, "num_attention_heads": 4}
    bert = blip2.BertConfig(num_hidden_layers=2, intermediate_size=2 * WIDTH, **sizes)
    opt = blip2_opt.OPTConfig(
        num_hidden_layers=layers,
        ffn_dim=2 * WIDTH,
        word_embed_proj_dim=WIDTH,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **sizes,
    )
    norm = partial(nn.LayerNorm, eps=1e-6)
    vit = {"img_size": PIXELS, "patch_size": 14, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    tower = VisionTransformer(qkv_bias=True, use_mean_pooling=False, norm_layer=norm, **vit)
    instead = {
        (blip2_opt.Blip2OPT, "init_tokenizer"): Letters,
        (blip2_opt.Blip2OPT, "init_vision_encoder"): lambda *_: (tower, blip2.LayerNorm(WIDTH)),
        (blip2_opt.AutoTokenizer, "from_pretrained"): lambda *_, **__: Letters(),
        (blip2_opt.OPTForCausalLM, "from_pretrained"): lambda *_, **__: blip2_opt.OPTForCausalLM(opt),
        (blip2.BertConfig, "from_pretrained"): lambda *_: bert,
        (blip2.BertLMHeadModel, "from_pretrained"): lambda *_, config: blip2.BertLMHeadModel(config),
    }
    replaced = [mock.patch.object(*where, new) for where, new in instead.items()]
    for one in replaced:
        one.start()
    try:
        model = blip2_opt.Blip2OPT(num_query_token=QUERIES, img_size=PIXELS, prompt=prompt, max_txt_len=20)
    finally:
        for one in replaced:
            one.stop()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # the usual 0.02 would leave a tiny model deaf to its picture
            nn.init.normal_(weight, std=1.0 if "query_tokens" in name else 0.25)
    model.opt_model.double()  # so that a wrong token shows far above the rounding of a cache or a padded batch
    return model.eval()
