"""No figure for a wrong result: every provider is held to the reference in float64 before it is timed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.latency.case import OURS, Case, Inputs
from bench.tolerance import assert_close_to_reference, error

ROUNDS_MORE = 0.05  # of the largest value: a rival may round between its steps, but not compute something else
TILE = 2**16  # rows of a memory that are held in float64 at once
# Input sets judged together. Of one set with four tokens plain torch's own error is a matter of luck: over three draws
# of one case it went from 1e-5 to 1e-4, and everybody else's likewise.
JUDGED = 4


def verdicts(case: Case, sets: Sequence[Inputs]) -> dict[str, str]:
    """For each provider "exact" (the tests' tolerance), "rounds more" (within 5 %) or "floor": timed; or why it is not.

    sets: of inputs; up to four are judged as one, a search by the first alone. A rival that does not run here is no
    reason to time nothing: its error is its verdict.
    """
    if case.operator == "cosine_topk":
        sets, judge = sets[:1], _search_judge(case, sets[0])
    else:
        sets, judge = sets[:JUDGED], _judge(case, sets[:JUDGED])
    words: dict[str, str] = {}
    for name, run in case.providers.items():
        if name == case.floor:
            words[name] = "floor"
            continue
        try:
            words[name] = judge([run(**inputs) for inputs in sets])
        except Exception as failed:  # code of others, which may fail in any way: told, not timed; ours is not forgiven
            if name == OURS:
                raise
            words[name] = f"does not run: {type(failed).__name__}: {failed}"[:300]
    return words


def _judge(case: Case, sets: Sequence[Inputs]) -> Any:
    exact = ({name: _double(value) for name, value in inputs.items()} for inputs in sets)
    truth = torch.stack([_first(case.specification(**inputs)) for inputs in exact])
    same_dtype = torch.stack([_first(case.specification(**inputs)) for inputs in sets])

    def word(results: list[Any]) -> str:
        first = [_first(result) for result in results]
        if any(result.shape != truth[0].shape for result in first):
            return f"shape {list(first[0].shape)}, but the reference has {list(truth[0].shape)}"
        result = torch.stack(first)
        try:
            assert_close_to_reference(result, truth, same_dtype, 2)
        except AssertionError as wrong:
            return "rounds more" if error(result, truth) <= ROUNDS_MORE * truth.abs().max().item() else str(wrong)
        return "exact"

    return word


def _search_judge(case: Case, inputs: Inputs) -> Any:
    """The items found are judged by their scores in float64: equal ones may stand in for each other.

    The truth is the reference's, tile by tile: a million keys in float64 would not fit beside the rest.
    """
    q, keys, norm, k, ranges = (inputs.get(name) for name in ("q", "keys", "key_norm", "k", "ranges"))
    assert q is not None and keys is not None and norm is not None and k is not None
    unit = torch.nn.functional.normalize(q.double(), dim=1)
    best, start = [], 0
    for rows, norms in zip(keys.split(TILE), norm.split(TILE), strict=True):
        of_tile = inputs | {"q": q.double(), "keys": rows.double(), "key_norm": norms.double()}
        if ranges is not None:
            of_tile["ranges"] = (ranges - start).clamp(0, len(rows))
        best.append(_first(case.specification(**of_tile)))
        start += len(rows)
    truth = torch.cat(best, dim=1).topk(k).values

    def word(results: list[Any]) -> str:
        indices = results[0][1]
        here = indices >= 0
        if ranges is not None:
            here &= (indices >= ranges[:, :1]) & (indices < ranges[:, 1:])
        if indices.shape != truth.shape or not bool((here == truth.isfinite()).all()):
            return "the items found are too few, too many, or not of the query's own range"
        if any(row.unique().numel() < row.numel() for row in (of[ok] for of, ok in zip(indices, here, strict=True))):
            return "one item was found twice"
        at = indices.clamp(min=0)
        found = (unit[:, None] * keys[at].double()).sum(-1) / norm[at].double()
        short = (truth - found.masked_fill(~here, -torch.inf).sort(dim=1, descending=True).values).nan_to_num(0.0)
        if short.max().item() <= 4 * torch.finfo(torch.float32).eps:
            return "exact"
        wrong = f"the items found score up to {short.max().item():.3g} less than the best"
        return "rounds more" if short.max().item() <= ROUNDS_MORE else wrong

    return word


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
