"""Hooks of patches without torch's: a `forward` on a module's instance that calls them.

A hook costs torch 1.6 us for every call of its module, and a decoding step of a small model calls twenty such modules
in 700 us. What torch's hooks may do, these may, in the same order among patches; hooks that others register later run
around all of them.
"""

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, Protocol

from torch import nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

_LINEAR = nn.Linear.forward  # libraries put one of their own in its place: that is called then


class Handle(Protocol):
    """What takes a hook off its module again: torch's RemovableHandle, or HookHandle."""

    def remove(self) -> None: ...


class HookedForward:
    """`forward` of one module: the module's own, or that of a fused patch (`inner`), between the hooks of patches.

    Hooks are called as torch calls those registered `with_kwargs`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.inner: Any = None
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.handles: list[HookHandle] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        for hook in self.before:
            changed = hook(module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        kind, own = type(module), module._parameters
        if self.inner is not None:
            output = self.inner(*args, **kwargs)
        elif (
            kind is nn.Linear
            and kind.forward is _LINEAR
            and len(args) == 1
            and not kwargs
            and "weight" in own
            and "bias" in own
        ):
            output = linear(args[0], own["weight"], own["bias"])  # `__getattr__` takes 0.5 us to find each of them
        else:
            output = kind.forward(module, *args, **kwargs)
        for hook in self.after:
            changed = hook(module, args, kwargs, output)
            if changed is not None:
                output = changed
        return output

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    def give_way(self) -> None:
        """Makes the hooks torch's: another forward has taken this one's place.

        So nothing is lost where that does not call this one, and nothing done twice where it does.
        """
        self.before, self.after = [], []
        for handle in self.handles:
            handle.register_with_torch()

    def leave(self) -> None:
        """Takes itself off the module, also from below a forward that accelerate has put around it since."""
        own = vars(self.module)
        for name, value in list(own.items()):
            if value is self and name == "forward" and self.inner is None:
                del own[name]
            elif value is self:
                own[name] = self.inner or MethodType(type(self.module).forward, self.module)


def own_product(module: nn.Module) -> bool:
    """Whether a hook sees a module's output or input first, and nothing is done between them but one product."""
    forward = module.__dict__.get("forward")
    plain = type(module) is nn.Linear and nn.Linear.forward is _LINEAR
    return plain and type(forward) is HookedForward and forward.inner is None


class WatchedForward(HookedForward):
    """The same for a module whose `after` hooks hear of its failures: they are called with None as the output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate's unwrap_model binds what it unwraps to the model once more
            args = args[1:]
        if is_compiling():
            return HookedForward.__call__(self, *args, **kwargs)
        try:
            return HookedForward.__call__(self, *args, **kwargs)  # a third of a microsecond less than by super()
        except BaseException:
            for hook in self.after:
                hook(self.module, args, kwargs, None)
            raise


class HookHandle:
    """One hook of a HookedForward: takes it off, and the HookedForward off its module with the last one."""

    def __init__(self, forward: HookedForward, hook: Any, after: bool) -> None:
        self.forward, self.hook, self.after = forward, hook, after
        self.torchs: Handle | None = None  # once it is a hook of torch
        (forward.after if after else forward.before).append(hook)
        forward.handles.append(self)

    def remove(self) -> None:
        """Takes the hook off."""
        forward = self.forward
        if self.torchs is not None:
            self.torchs.remove()
        forward.handles = [handle for handle in forward.handles if handle is not self]
        forward.before = [hook for hook in forward.before if hook is not self.hook]
        forward.after = [hook for hook in forward.after if hook is not self.hook]
        if not forward.handles:
            forward.leave()

    def register_with_torch(self) -> None:
        """Makes it a hook of torch."""
        if self.torchs is None:
            add = _torchs_after if self.after else _torchs_before
            self.torchs = add(self.forward.module, self.hook, isinstance(self.forward, WatchedForward))


def hook_before(module: nn.Module, hook: Any, *, torchs: bool = False, watched: bool = False) -> Handle:
    """Calls `hook(module, args, kwargs)` before the module; what it returns, if not None, is called instead.

    torchs: as a hook of torch, which it also is where the module has hooks or a forward of others already.
    watched: hooks after this module want to hear of its failures.
    """
    forward = None if torchs else _forward(module, watched)
    return _torchs_before(module, hook, watched) if forward is None else HookHandle(forward, hook, after=False)


def hook_after(module: nn.Module, hook: Any, *, torchs: bool = False, watched: bool = False) -> Handle:
    """Calls `hook(module, args, kwargs, output)` after the module; what it returns, if not None, is the output."""
    forward = None if torchs else _forward(module, watched)
    return _torchs_after(module, hook, watched) if forward is None else HookHandle(forward, hook, after=True)


def hooks_before(module: nn.Module) -> Iterator[Any]:
    """All hooks before a module: ours, then torch's."""
    there = vars(module).get("forward")
    if isinstance(there, HookedForward):
        yield from there.before
    yield from module._forward_pre_hooks.values()


def _torchs_before(module: nn.Module, hook: Any, watched: bool) -> Handle:
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _torchs_after(module: nn.Module, hook: Any, watched: bool) -> Handle:
    return module.register_forward_hook(hook, with_kwargs=True, always_call=watched)


def _forward(module: nn.Module, watched: bool) -> HookedForward | None:
    """The module's HookedForward, put there if need be; None where a hook of torch keeps its place among others'."""
    there = vars(module).get("forward")
    if isinstance(there, HookedForward):
        return there
    if there is not None or module._forward_hooks or module._forward_pre_hooks:
        return None
    vars(module)["forward"] = made = (WatchedForward if watched else HookedForward)(module)
    return made
