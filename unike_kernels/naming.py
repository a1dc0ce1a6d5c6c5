"""Cases that are named by hand, for packed passes: what may be named, and which slots go on with what was decided."""

from dataclasses import replace

import torch
from torch import Tensor

from .cases import Cases, CaseState, Version

FREE = -2  # in the place of a case token: the slot's decisions are forgotten


def named_cases(
    token_to_case: Tensor | None, case_tokens: Tensor | None, before: CaseState | None, version: Version
) -> Cases | None:
    """The cases named for passes of T tokens; None, to find them automatically, where neither tensor is given.

    token_to_case: [T] int64, -1 for tokens of no case; case_tokens: [C] int64 rows into the T tokens, -1 for a case
    that an earlier pass decided (its slot's decisions are kept), FREE for a slot that is free. before: what was decided
    for the slots named last, under `version` if it still holds. ValueError where tokens are of a case that has neither
    a case token nor a decision, or the tensors do not fit together.
    """
    if token_to_case is None or case_tokens is None:
        if token_to_case is not None or case_tokens is not None:
            raise ValueError("set_cases takes both token_to_case and case_tokens, or None for both")
        return None
    if token_to_case.device != case_tokens.device:
        raise ValueError(f"token_to_case is on {token_to_case.device}, but case_tokens are on {case_tokens.device}")
    token_to_case, case_tokens = token_to_case.long().reshape(-1), case_tokens.long().reshape(-1)
    tokens, size = token_to_case.numel(), case_tokens.numel()
    _check_range("token_to_case", token_to_case, size, f"{size} case tokens")
    _check_range("case_tokens", case_tokens, tokens, f"{tokens} tokens", lowest=FREE)
    new, taken = case_tokens >= 0, case_tokens != FREE
    if not bool(taken.all()):
        case_tokens = case_tokens.clamp(min=-1)  # else the caller's own tensor, which an engine may overwrite
    owner = token_to_case[case_tokens[new]]
    if not torch.equal(owner, new.nonzero().flatten().to(owner)):
        raise ValueError(
            f"case tokens {case_tokens[new].tolist()} of cases {new.nonzero().flatten().tolist()} belong to "
            f"cases {owner.tolist()}"
        )
    stale = before is not None and before.version != version
    if before is not None and (stale or before.known is None):
        before = None
    if before is not None and before.size != size:
        before = before.resized(size)
    known = torch.zeros_like(new) if before is None or before.known is None else before.known.to(new.device) & taken
    used = torch.zeros_like(new).index_fill(0, token_to_case[token_to_case >= 0], True)
    missing = (used & ~new & ~known).nonzero().flatten().tolist()
    if missing:
        why = (
            "were decided before the edits changed: prefill them again"
            if stale
            else "were never decided: a new slot, one that was freed, or what was decided was forgotten by set_cases()"
        )
        raise ValueError(f"cases {missing} have no case token in this pass and {why}")
    if before is None or bool(new.all()):
        return Cases(token_to_case, case_tokens, CaseState(version, size), fresh=True, known=new)
    state = replace(before, layers=dict(before.layers), known=known)
    return Cases(token_to_case, case_tokens, state, decided=not bool(new.any()), known=known | new)


def _check_range(name: str, index: Tensor, size: int, what: str, lowest: int = -1) -> None:
    if index.numel() and not lowest <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"{name} must be in [{lowest}, {size}) for {what}, but spans [{int(index.min())}, {int(index.max())}]"
        )


def cases_from_ptr(case_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """(token_to_case [T], case_tokens [C]) of a packed batch in CSR form: case c is tokens case_ptr[c]:case_ptr[c+1].

    case_ptr: [C + 1] int64, starting at 0, not falling; every case token is its case's last token. An empty case has
    case token -1.
    """
    if case_ptr.dim() != 1 or case_ptr.numel() == 0 or case_ptr.is_floating_point():
        raise ValueError(f"case_ptr must be [C + 1] integers, but got {tuple(case_ptr.shape)} {case_ptr.dtype}")
    lengths = case_ptr[1:] - case_ptr[:-1]
    if int(case_ptr[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"case_ptr must start at 0 and never fall, but got {case_ptr.tolist()}")
    case = torch.arange(lengths.numel(), device=case_ptr.device)
    return torch.repeat_interleave(case, lengths), torch.where(lengths > 0, case_ptr[1:] - 1, -1)
