"""What a training step need not compute: nothing that is the same in every step, nothing that no loss sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..cases import Cases
from ..forwards import HookedForward
from ..models import LayerSites, get_module
from ..patching import PatchHandle


class _Seen(Exception):
    """The module gave its output; nothing after it needs to run."""


@torch.no_grad()
def output_of(module: nn.Module, layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `module` gives inside `layer`, of which nothing behind it runs; None where `replayed` could not give it.

    hidden, args, kwargs: what the layer is called with. Only hooks inside the module's `forward` are left out by
    `replayed`: there must be no others.
    """
    kept: list[Any] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        kept.append(output)
        raise _Seen

    if not isinstance(vars(module).get("forward"), HookedForward) or _hooked(module):
        return None
    hook = module.register_forward_hook(see)
    try:
        layer(hidden, *args, **kwargs)
    except _Seen:
        return kept[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(layer).__name__} did not run its {type(module).__name__}")


@contextmanager
def replayed(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the module gives `output`, which `output_of` found, and neither it nor its patches' hooks run."""
    own = vars(module)
    before = own["forward"]
    own["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        own["forward"] = before


@contextmanager
def rows_only(model: nn.Module, sites: LayerSites, handle: PatchHandle, rows: Tensor) -> Iterator[None]:
    """Inside, a layer comes out right at these rows [P] of the B * S tokens alone, its case tokens among them.

    The other tokens are attended to as ever, but neither shifted nor fed to the FFN. So for a last layer, of which
    nothing else is read. Inside `cases_named`.
    """
    tracker, positions = handle.record.runtime.tracker, handle.record.config.shift.positions
    cases = tracker.current
    assert cases is not None
    owner = cases.token_to_case[rows]
    attention = Cases(
        torch.full_like(cases.token_to_case, -1).index_copy(0, rows, owner), cases.case_tokens, cases.state, fresh=True
    )
    ffn = Cases(cases.rows(positions)[rows], rows[:0], cases.state, fresh=True)  # without case tokens, all rows count
    shapes: list[torch.Size] = []

    def choose(module: nn.Module, args: tuple) -> tuple:
        shapes.append(args[0].shape)
        tracker.current = ffn
        return (args[0].reshape(-1, args[0].shape[-1])[rows], *args[1:])

    def spread(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        tracker.current = attention
        shape = shapes.pop()
        whole = output.new_zeros(shape.numel() // shape[-1], output.shape[-1]).index_copy(0, rows, output)
        return whole.view(*shape[:-1], -1)

    hooks = [
        get_module(model, sites.ffn_input).register_forward_pre_hook(choose, prepend=True),
        get_module(model, sites.ffn_output).register_forward_hook(spread),
    ]
    tracker.current = attention
    try:
        yield
    finally:
        tracker.current = cases
        for hook in hooks:
            hook.remove()


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def batch_axes(of_all: Any, of_two: Any) -> list[int | None] | None:
    """Along which axis each tensor in a tree `of_all` of B rows holds the rows; None for one that all rows share.

    of_two: the same of two of these rows, B > 2, so that it is seen and not guessed what grows with the batch. No list
    where that does not show: the trees are unlike, or hold something that is neither a tensor nor a plain value.
    """
    (all_leaves, all_shape), (two_leaves, two_shape) = tree_flatten(of_all), tree_flatten(of_two)
    if all_shape != two_shape:
        return None
    axes: list[int | None] = []
    for a, b in zip(all_leaves, two_leaves, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or not isinstance(a, bool | int | float | str | None) or a != b:
                return None
            axes.append(None)
            continue
        unlike = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
        if a.dim() != b.dim() or len(unlike) > 1 or any(b.shape[i] != 2 for i in unlike):
            return None
        axes.append(unlike[0] if unlike else None)
    return axes


def narrowed(of_all: Any, axes: list[int | None], keep: Tensor) -> Any:
    """The tree with the rows `keep` [b] alone, of the axes that `batch_axes` found."""
    leaves, shape = tree_flatten(of_all)
    kept = [x if axis is None else x.index_select(axis, keep) for x, axis in zip(leaves, axes, strict=True)]
    return tree_unflatten(kept, shape)
