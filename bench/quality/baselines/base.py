"""What every baseline stands on: the base model with its sites, changes of linear maps as hooks, and the interface.

A method never writes the base model's weights: what an edit changes is added by hooks that live as long as `apply` is
open, so that afterwards the base is what it was, bit for bit, whatever happened in between.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unike_kernels.caches import CACHE_NAMES
from unike_kernels.editing.editor import base_only
from unike_kernels.editing.inputs import Batch, Collator, Sample
from unike_kernels.editing.prefix import Prefix, head, run_prefix, run_tail
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.fused import linear_names
from unike_kernels.models import find_decoder, get_module

Change = dict[str, Tensor]  # name of a linear map -> what is added to its weight, [E, out, in] for E edits


@dataclass(frozen=True)
class Pass:
    """The forward pass that runs now: B rows of S tokens; each row's case token, None where a KV cache goes on."""

    shape: tuple[int, int]
    case_position: Tensor | None


_asked: list[Batch] = []


@contextmanager
def asking(batch: Batch) -> Iterator[None]:
    """Inside, methods know where the prompts of this teacher-forced batch end; else a prompt ends where its pass does.

    Needed by what decides by the prompt alone: GRACE and SERAC.
    """
    _asked.append(batch)
    try:
        yield
    finally:
        _asked.pop()


class Host:
    """A base model, its decoder's sites and its collator; UnsupportedModelError for a decoder of no known family."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = model
        self.decoder = find_decoder(model)
        self.layers = self.decoder.default_layers()  # where edits may act: UniKE's own choice, the last four
        self.collator = Collator(model, processor)
        self.head = head(model, self.decoder)
        self._pass: Pass | None = None

    @property
    def width(self) -> int:
        """The hidden size d."""
        return self.decoder.layers[0].hidden_size

    def ffn_maps(self, layers: Sequence[int]) -> list[str]:
        """Names of the FFN's maps in `layers`: the two of an FFN without a gate, up and down of a gated one.

        Without the gate's own map, as the published multimodal MEND and FT do it.
        """
        return [name for i in layers for name in linear_names(self.decoder.layers[i])[-2:]]

    def linear(self, name: str) -> nn.Module:
        """The linear map of this name."""
        return get_module(self.model, name)

    def embeddings(self) -> nn.Module:
        """The token embeddings: of the nearest module around the decoder that tells them."""
        parts = self.decoder.name.split(".") if self.decoder.name else []
        for i in range(len(parts), -1, -1):
            module = get_module(self.model, ".".join(parts[:i]))
            try:
                return module.get_input_embeddings()
            except (AttributeError, NotImplementedError):  # no such method; transformers: one that cannot tell
                continue
        raise ValueError(f"no token embeddings around {self.decoder.name!r} in {type(self.model).__name__}")

    def silent(self) -> set[int]:
        """Token ids that are no text: padding, special tokens and a picture's place."""
        collator, config = self.collator, getattr(self.model, "config", None)
        ids = {collator.pad, *collator.tokenizer.all_special_ids}
        for owner in (self.model, config, collator.processor):
            for name in ("image_token_id", "image_token_index"):
                found = getattr(owner, name, None)
                if isinstance(found, int):
                    ids.add(found)
        return ids

    def prefix(self, batch: Batch, first: int) -> Prefix:
        """What enters layer `first`: the layers below do not depend on an edit, so they run once."""
        return run_prefix(self.model, self.decoder, batch, first)

    def tail(self, prefix: Prefix) -> Tensor:
        """[B, S, d] the decoder's output from `prefix` on, with gradients where they are on."""
        return run_tail(self.model, self.decoder, prefix)

    def target_logits(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, V] in float32, wanted ids [T], row of each [T]) at all target positions of the batch."""
        at = batch.target_mask[:, 1:]
        return self.head(hidden[:, :-1][at]).float(), batch.inputs["input_ids"][:, 1:][at], at.nonzero()[:, 0]

    def loss(self, batch: Batch, hidden: Tensor) -> Tensor:
        """[B] mean negative log-likelihood of every row's target tokens."""
        logits, wanted, row = self.target_logits(batch, hidden)
        nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
        return nll.new_zeros(batch.shape[0]).index_add(0, row, nll) / batch.target_mask[:, 1:].sum(dim=1)

    @contextmanager
    def passes(self) -> Iterator[Callable[[], Pass]]:
        """Inside, the yielded function tells the `Pass` that runs: for hooks on modules that see flattened tokens."""

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = kwargs.get("inputs_embeds")
            if inputs is None:
                inputs = kwargs.get("input_ids", args[0] if args else None)
            b, s = inputs.shape[:2]
            cache = next((kwargs[n] for n in CACHE_NAMES if kwargs.get(n) is not None), None)
            mask = kwargs.get("attention_mask")
            last: Tensor | None = torch.full((b,), s - 1, device=inputs.device)
            if cache is not None and cache.get_seq_length() > 0:
                last = None
            elif _asked and _asked[-1].shape == (b, s):
                last = _asked[-1].case_position
            elif isinstance(mask, Tensor) and mask.dim() == 2:
                last = s - 1 - mask[:, -s:].long().flip(1).argmax(dim=1)
            self._pass = Pass((b, s), last)

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            self._pass = None

        def now() -> Pass:
            if self._pass is not None:
                return self._pass
            if _asked:
                return Pass(_asked[-1].shape, _asked[-1].case_position)
            raise RuntimeError("the decoder's layers were called without the decoder: name the batch with asking()")

        decoder = get_module(self.model, self.decoder.name)
        hooks = [decoder.register_forward_pre_hook(begin, with_kwargs=True), decoder.register_forward_hook(end)]
        try:
            yield now
        finally:
            for hook in hooks:
                hook.remove()
            self._pass = None


@contextmanager
def changed(host: Host, change: Change) -> Iterator[None]:
    """Inside, every named map computes x W^T + x change^T (+ b).

    Of E > 1 changes each acts on its own share of the rows: the first B / E rows see the first, and so on.
    """
    hooks = []
    for name, delta in change.items():

        def add(module: nn.Module, args: tuple, output: Tensor, delta: Tensor = delta) -> Tensor:
            x = args[0].reshape(len(delta), -1, delta.shape[-1])
            return output + (x.to(delta) @ delta.mT).reshape(output.shape).to(output)

        hooks.append(host.linear(name).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def summed(first: Change, second: Change) -> Change:
    """Both changes one after the other: their sum."""
    return {n: first.get(n, 0) + second.get(n, 0) for n in {**first, **second}}


def learned_dtype(weight: Tensor) -> torch.dtype:
    """What a change of this weight is learned in: float32 at least, as Adam's steps fall below half precision's."""
    return torch.promote_types(weight.dtype, torch.float32)


class Carrying(Edited):
    """A model that carries edits; its method reads in `running` which batch is asked."""

    def running(self, batch: Batch) -> AbstractContextManager[Any]:
        """Names the batch to what decides by its prompts."""
        return asking(batch)


class Baseline(Method):
    """A way to edit: `fit` on training-split records (most need none), then `apply` as often as wanted."""

    name: str
    source: str  # the paper, by authors, venue and year
    trained: bool = False  # whether `fit` learns anything
    share: int = 1  # of the training-split edits that it learns from: times as many as the others
    fits_any: bool = False  # whether what `fit` leaves is the same for all settings

    def __init__(self, model: nn.Module, processor: Any, config: Any = None) -> None:
        self.host = Host(model, processor)
        self.config = config if config is not None else self.trials()[0]

    @classmethod
    @abstractmethod
    def trials(cls) -> tuple[Any, ...]:
        """The settings that were tried on the development split, the chosen one first; as many for every method."""

    def settings(self) -> dict[str, Any]:
        """The method's settings."""
        return asdict(self.config)

    def check(self, requests: Sequence[Sample]) -> None:
        """ValueError on a request without a prompt or a target."""
        for n, r in enumerate(requests):
            if not r.prompt.strip() or not (r.target or "").strip():
                raise ValueError(f"request {n} needs a prompt and a target, but has {r.prompt!r} and {r.target!r}")

    @contextmanager
    def apply(self, requests: Sequence[Sample]) -> Iterator[Edited]:
        """Inside, the model is edited with all `requests`, made one after another; afterwards it is the base again.

        ValueError on a request without a target, before anything has changed.
        """
        self.check(requests)
        with base_only(self.host.model):
            state = self.edit(requests)
        with self.carrying(state) as edited:
            yield edited

    @contextmanager
    def carrying(self, state: Any) -> Iterator[Edited]:
        """Inside, the model carries what `edit` returned."""
        with base_only(self.host.model), self.active(state) as edited:
            yield edited or Carrying()

    @abstractmethod
    def edit(self, samples: Sequence[Sample]) -> Any:
        """What the edits come to, all of them one after another; nothing on the model stays changed."""

    @abstractmethod
    def active(self, state: Any) -> AbstractContextManager[Edited | None]:
        """Inside, the model has what `edit` returned; it may say what happens around the passes."""


def descend(
    losses: Callable[[], tuple[Tensor, Tensor]],
    leaves: Sequence[Tensor],
    *,
    lr: float,
    steps: int,
    enough: float,
    decay: float = 0.0,
) -> float:
    """Adam on `leaves` until the edit's own loss is at most `enough`, for at most `steps`; returns that loss.

    losses: what to minimise, and the edit's own loss, which may be a part of it.
    """
    optimizer = torch.optim.AdamW(leaves, lr, weight_decay=decay)
    found = float("nan")
    with torch.enable_grad():
        for step in range(steps + 1):
            loss, own = losses()
            found = float(own.detach())
            if found <= enough or step == steps:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found


class ChangesMaps(Baseline):
    """A method that changes linear maps, edit by edit, on what edits before it left: many can be made side by side.

    So one-step edits are, up to `together` in one batch; what comes out is what each alone gives, to rounding.
    """

    together = 50

    @abstractmethod
    def change(self, samples: Sequence[Sample], before: Change) -> Change:
        """The changes [E, out, in] of E edits, each made on its own of the model that carries `before`.

        samples: all with a picture or all without.
        """

    def edit(self, samples: Sequence[Sample]) -> Change:
        """The sum of what every edit added, one after another, [1, out, in] by map."""
        total: Change = {}
        for sample in samples:
            total = summed(total, self.change([sample], total))
        return total

    def active(self, state: Change) -> AbstractContextManager[None]:
        """The changed maps."""
        return changed(self.host, state)

    def one_step(self, requests: Sequence[Sample]) -> Iterator[AbstractContextManager[Edited]]:
        """Makes up to `together` requests in one batch, and puts them on one by one."""
        self.check(requests)
        for at in range(0, len(requests), self.together):
            some = requests[at : at + self.together]
            changes: dict[int, Change] = {}
            for has in (True, False):
                here = [i for i, r in enumerate(some) if (r.image is not None) is has]
                if here:
                    with base_only(self.host.model):
                        found = self.change([some[i] for i in here], {})
                    changes |= {i: {n: d[e : e + 1] for n, d in found.items()} for e, i in enumerate(here)}
            yield from (self.carrying(changes[i]) for i in range(len(some)))


def descend_apart(
    loss: Callable[[], Tensor], leaves: Sequence[Tensor], *, lr: float, steps: int, enough: float
) -> None:
    """`descend` of E edits side by side: leaves [E, ...]; loss gives [E], each edit's own, which it alone stops at.

    Adam takes element by element, so that an edit's steps are those that it would take alone.
    """
    optimizer = torch.optim.Adam(leaves, lr)
    done: dict[int, list[Tensor]] = {}
    with torch.enable_grad():
        for step in range(steps + 1):
            own = loss()
            for e in range(len(own)):
                if e not in done and (step == steps or own[e] <= enough):
                    done[e] = [leaf[e].detach().clone() for leaf in leaves]
            if len(done) == len(own):
                break
            optimizer.zero_grad()
            own.sum().backward()
            optimizer.step()
    with torch.no_grad():
        for e, rows in done.items():
            for leaf, row in zip(leaves, rows, strict=True):
                leaf[e] = row
