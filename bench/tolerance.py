"""The tolerance that every kernel has to earn: a multiple of what rounding alone costs, measured on the same inputs."""

import torch
from torch import Tensor


def error(actual: Tensor, reference64: Tensor) -> float:
    """The largest absolute difference, in float64."""
    if actual.shape != reference64.shape:
        raise AssertionError(f"shape {list(actual.shape)}, but the reference has {list(reference64.shape)}")
    return (actual.double() - reference64.double()).abs().max().item() if actual.numel() else 0.0


def assert_close_to_reference(
    actual: Tensor, reference64: Tensor, same_dtype: Tensor, factor: float, scale: float | None = None
) -> None:
    """The error of `actual` is at most `factor` times that of `same_dtype`, plus 2 eps max|reference64| (or `scale`).

    reference64: the reference on the same inputs, in float64. same_dtype: plain torch that accumulates in float32 and
    rounds once, to the dtype of `actual`. factor: 2 for a forward, 3 for a gradient. scale: of the terms where a result
    is a sum in which they cancel: 1 for a cosine, whose rounding is no smaller where it is near 0.
    """
    if not reference64.dtype == torch.float64:
        raise AssertionError(f"the reference must be float64, but is {reference64.dtype}")
    if actual.dtype != same_dtype.dtype:
        raise AssertionError(f"{actual.dtype} is compared with {same_dtype.dtype}")
    if not (actual.isfinite().all() and same_dtype.isfinite().all() and reference64.isfinite().all()):
        raise AssertionError("not finite: the error of NaN or inf says nothing")
    if scale is None:
        scale = reference64.abs().max().item() if reference64.numel() else 0.0
    allowed = factor * error(same_dtype, reference64) + 2 * torch.finfo(actual.dtype).eps * scale
    found = error(actual, reference64)
    if not found <= allowed:
        raise AssertionError(
            f"error {found:.3e}, allowed {allowed:.3e} ({factor} times that of plain torch, plus 2 eps)"
        )
