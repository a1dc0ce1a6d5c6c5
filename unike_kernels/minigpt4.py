"""MiniGPT-4 as published: vision tower, Q-Former, one projection, LLaMA; put together from ready modules.

Sizes: B rows, S tokens, Q query tokens (32 as published), d the language model's hidden size.

TEMPLATE is what the published Vicuna weights were fine-tuned on: `prompt_template` of Vision-CAIR/MiniGPT-4's
train_configs/minigpt4_stage2_finetune.yaml and eval_configs/minigpt4_eval.yaml, which ends in a space, around the lines
of prompts/alignment.txt (a picture in <Img> and </Img>, a space, the question). Those weights end an answer with "###"
(END, `end_sym` there) instead of EOS. The chat demo there (minigpt4/conversation/conversation.py) puts a system text
before and no space behind: that is another `template`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = "<ImageHere>"  # in a template: where the picture goes; in a tokenizer: the placeholder of one image token
TEMPLATE = f"###Human: <Img>{IMAGE}</Img> {{}} ###Assistant: "  # {} is the question
END = "###"


def image_token_id(tokenizer: Any) -> int:
    """Id of the placeholder token; a tokenizer without one learns it here, and no embedding is ever read at it."""
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE)


class MiniGPT4(nn.Module):
    """MiniGPT-4 with its published attribute names, so that a published checkpoint loads with strict=False.

    visual_encoder: pictures -> [B, P, v], or an output with that as `last_hidden_state`; ln_vision: norm after it.
    Qformer: a Q-Former, or a module that holds one as `bert`; query_tokens: [1, Q, q].
    llama_model: a causal language model of transformers, its decoder found as `llama_model.model`.
    llama_proj: q -> d; a fresh nn.Linear where none is given. end_sym: what ends an answer beside EOS: an Editor cuts
    generated answers there.

    Inputs are those of MiniGPT4Processor: Q placeholders in input_ids stand for the picture, so that logits and labels
    line up with input_ids one to one.
    """

    def __init__(
        self,
        visual_encoder: nn.Module,
        ln_vision: nn.Module,
        Qformer: nn.Module,
        query_tokens: nn.Parameter,
        llama_model: nn.Module,
        llama_tokenizer: Any,
        llama_proj: nn.Module | None = None,
        end_sym: str = END,
    ) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.ln_vision = ln_vision
        self.Qformer = Qformer
        self.query_tokens = query_tokens
        if llama_proj is None:
            width = llama_model.get_input_embeddings().weight.shape[1]
            like = {"dtype": query_tokens.dtype, "device": query_tokens.device}
            llama_proj = nn.Linear(query_tokens.shape[-1], width, **like)
        self.llama_proj = llama_proj
        self.llama_model = llama_model
        self.llama_tokenizer = llama_tokenizer
        self.image_token_id = image_token_id(llama_tokenizer)
        self.end_sym = end_sym

    @classmethod
    def from_blip2(
        cls, blip2: nn.Module, llama_model: nn.Module, tokenizer: Any, *, llama_proj: nn.Module | None = None
    ) -> "MiniGPT4":
        """MiniGPT-4 on the vision model, Q-Former and query tokens of transformers' BLIP-2, shared and not copied.

        ln_vision is an nn.Identity there: transformers' vision model ends with that norm.
        """
        parts = (blip2.vision_model, nn.Identity(), blip2.qformer, blip2.query_tokens)
        return cls(*parts, llama_model, tokenizer, llama_proj)

    def encode_img(self, pixel_values: Tensor) -> Tensor:
        """[B, Q, d] what the language model sees of each picture [B, C, H, W]."""
        seen = self.visual_encoder(pixel_values.to(_dtype(self.visual_encoder, pixel_values)))
        seen = self.ln_vision(getattr(seen, "last_hidden_state", seen)).to(self.query_tokens.dtype)
        out = getattr(self.Qformer, "bert", self.Qformer)(
            query_embeds=self.query_tokens.expand(len(seen), -1, -1),
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        )
        image = out.last_hidden_state
        return self.llama_proj(image.to(_dtype(self.llama_proj, image)))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """[B, S, d] input embeddings, with the pictures in the places of their placeholders, in order.

        ValueError where placeholders and pictures do not match.
        """
        where = input_ids == self.image_token_id
        self._check_placeholders(where, 0 if pixel_values is None else len(pixel_values))
        embeds = self.llama_model.get_input_embeddings()(input_ids.masked_fill(where, 0))
        if pixel_values is None:
            return embeds
        image = self.encode_img(pixel_values).to(embeds)
        return embeds.masked_scatter(where[..., None].expand_as(embeds), image)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        """The language model's output for input_ids, attention_mask and labels [B, S]; `kw` goes to it.

        Without pixel_values it is that of the language model alone, bit for bit.
        """
        embeds = self.embed(input_ids, pixel_values)
        return self.llama_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **kw)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kw: Any,
    ) -> Any:
        """What the language model's `generate` gives for the embeddings: the new tokens [B, new], without the prompt.

        `kw` goes to it: max_new_tokens, num_beams and so on.
        """
        embeds = self.embed(input_ids, pixel_values)
        return self.llama_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kw)

    def _check_placeholders(self, where: Tensor, pictures: int) -> None:
        """Refuses a wrong number of placeholders; not under torch.compile, where nothing can look at values."""
        per_picture = self.query_tokens.shape[1]
        if torch.compiler.is_compiling() or int(where.sum()) == pictures * per_picture:
            return
        raise ValueError(
            f"{pictures} pictures take {pictures * per_picture} image placeholders ({IMAGE}, id {self.image_token_id}, "
            f"{per_picture} for each), but the rows of input_ids have {where.sum(dim=1).tolist()}"
        )


class MiniGPT4Processor:
    """Pictures and questions to MiniGPT-4's inputs, wrapped as published: BOS, the template, the question in it.

    image_processor: called with images=, return_tensors=, gives pixel_values. num_query_tokens: Q of the model.
    template: holds <ImageHere> and {} once each; both of its parts are tokenized on their own, as published.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, num_query_tokens: int = 32, template: str = TEMPLATE
    ) -> None:
        if template.count(IMAGE) != 1 or template.count("{}") != 1:
            raise ValueError(f"template must hold {IMAGE} once and {{}} once, but is {template!r}")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.num_query_tokens = num_query_tokens
        self.template = template
        self.image_token_id = image_token_id(tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = "",
        return_tensors: str | None = None,
        padding: bool | str = False,
    ) -> Any:
        """A BatchFeature: input_ids and attention_mask [B, S], and for images pixel_values [B, C, H, W].

        One text per image. Text without images is what the tokenizer makes of it, without the template. With padding,
        rows are filled up to the longest, on the tokenizer's padding_side.
        """
        from transformers import BatchFeature

        texts = [text] if isinstance(text, str) else list(text)
        if images is None:
            rows, features = self.tokenizer(texts)["input_ids"], {}
        else:
            rows = [self.wrap(t) for t in texts]
            features = {
                "pixel_values": self.image_processor(images=images, return_tensors=return_tensors)["pixel_values"]
            }
            if len(features["pixel_values"]) != len(rows):
                raise ValueError(f"one text per image, but got {len(rows)} and {len(features['pixel_values'])}")
        masks = [[1] * len(row) for row in rows]
        if padding:
            rows, masks = self._padded(rows, self._pad_id()), self._padded(masks, 0)
        return BatchFeature({"input_ids": rows, "attention_mask": masks, **features}, tensor_type=return_tensors)

    def wrap(self, text: str) -> list[int]:
        """Token ids of one question about a picture: BOS once, Q placeholders inside <Img> and </Img>."""
        if IMAGE in text:
            raise ValueError(f"a question must not contain {IMAGE}, the template does: {text!r}")
        before, after = (self._ids(part.replace("{}", text)) for part in self.template.split(IMAGE))
        bos = self.tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *before, *[self.image_token_id] * self.num_query_tokens, *after]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _padded(self, rows: list[list[int]], value: int) -> list[list[int]]:
        longest = max(map(len, rows))
        if self.tokenizer.padding_side == "left":
            return [[value] * (longest - len(row)) + row for row in rows]
        return [row + [value] * (longest - len(row)) for row in rows]


def _dtype(module: nn.Module, like: Tensor) -> torch.dtype:
    """What a module computes in: its first float parameter's dtype, `like`'s without one."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), like.dtype)
