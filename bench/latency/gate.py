"""No figure for a wrong result: every provider is held to the reference in float64 before it is timed."""

from typing import Any

import torch
from torch import Tensor

from bench.latency.cases import Case, Inputs
from bench.tolerance import assert_close_to_reference, error

ROUNDS_MORE = 0.05  # of the largest value: a rival may round between its steps, but not compute something else


def verdict(case: Case, provider: str, inputs: Inputs) -> str:
    """What may be timed: "exact" (the tests' tolerance), "rounds more" (within 5 %), "floor"; else what is wrong."""
    if provider == case.floor:
        return "floor"
    result = _first(case.providers[provider](**inputs))
    wide = {name: _double(value) for name, value in inputs.items()}
    truth = _first(case.specification(**wide))
    same_dtype = _first(case.specification(**inputs))
    if case.operator == "cosine_topk":
        return _verdict_of_search(case, provider, inputs, wide, truth)
    try:
        assert_close_to_reference(result, truth, same_dtype, 2)
    except AssertionError as wrong:
        off = error(result, truth) if result.shape == truth.shape else float("inf")
        return "rounds more" if off <= ROUNDS_MORE * truth.abs().max().item() else str(wrong)
    return "exact"


def _verdict_of_search(case: Case, provider: str, inputs: Inputs, wide: Inputs, truth: Tensor) -> str:
    """The items found are judged by their scores in float64: equal ones may stand in for each other."""
    _, indices = case.providers[provider](**inputs)
    unit = torch.nn.functional.normalize(wide["q"], dim=1)
    found = (unit[:, None] * wide["keys"][indices]).sum(-1) / wide["key_norm"][indices]
    short = (truth.sort(dim=1).values - found.sort(dim=1).values).max().item()
    if short <= 4 * torch.finfo(torch.float32).eps:
        return "exact"
    return "rounds more" if short <= ROUNDS_MORE else f"the items found score up to {short:.3g} less than the best"


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
