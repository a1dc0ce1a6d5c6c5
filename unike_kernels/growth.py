"""Warnings of passes whose last token is taken for the prompt's end, where it may not be that."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .cases import may_ask


class Growth:
    """What one patch has seen of passes that may hold more than their prompts; it warns of them once."""

    def __init__(self) -> None:
        self.ids: Any = None  # [B, length] tokens of the last pass, where they were at hand
        self.shape = (0, 0)  # its B and length
        self.steps = 0  # passes in a row that were the one before and a token more
        self.warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": None, "shape": (0, 0), "steps": 0}  # passes of this process

    def watch(self, ids: Any, shape: tuple[int, int], asked: bool) -> None:
        """Warns when passes without a KV cache grow token by token: each one's last token is taken for a prompt's.

        asked: use_cache=False says that they are such passes; otherwise the tokens `ids` [B, length], if at hand, do.
        """
        if torch.compiler.is_compiling() or self.warned:
            return
        before, (batch, length) = self.ids, self.shape
        grows = shape == (batch, length + 1)
        if grows and not asked:
            known = isinstance(ids, Tensor) and isinstance(before, Tensor) and ids.device == before.device
            grows = known and may_ask() and torch.equal(ids[:, :-1], before)
        self.ids, self.shape, self.steps = ids, shape, self.steps + 1 if grows else 0
        if self.steps == 2:
            self.warned = True
            warnings.warn(
                "this looks like generation without a KV cache: every pass is a new case, whose case token is the "
                "newest token. Name the prompts' ends with handle.set_cases(case_positions=...), or use a KV cache",
                stacklevel=2,
            )

    def suspect(self) -> None:
        """Warns where a first pass may hold more than its prompt: nothing tells a guessed token from a prompt's."""
        if torch.compiler.is_compiling() or self.warned:
            return
        self.warned = True
        warnings.warn(
            "the logits of several tokens of a first pass are asked for, but its last token is taken for the "
            "prompt's end. Where it already holds guesses (assisted generation, prompt lookup) or an answer, "
            "name the prompts' ends with handle.set_cases(case_positions=...)",
            stacklevel=2,
        )
