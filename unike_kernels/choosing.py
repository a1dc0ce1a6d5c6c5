"""A module's backend: chosen when the module is made, and anew only where its tensors move; never by a call."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import backends
from .keeping import to_keep


class ChoosesBackend(nn.Module):
    """asked: "auto" or a name, as given to `patch`; backend: what that means for the module's tensors.

    On a CPU "auto" stays "auto": there the sizes of each call say whether native code or the reference is the faster.
    """

    asked: str
    backend: str
    moves = 0  # of such modules in this process: how often tensors may have come to lie elsewhere

    def choose(self, asked: str) -> None:
        """Takes the backend for the tensors as they are. ValueError where one that is named cannot run."""
        self.asked, self.backend = asked, asked
        for tensor in self.buffers():
            if tensor.is_floating_point() and tensor.device.type != "meta":
                chosen = backends.resolve(asked, tensor.device, tensor.dtype)
                self.backend = asked if chosen == "cpu" else chosen
                break

    @property
    def kernels(self) -> str:
        """What a call of an operator is given: "auto" where a GPU has two kinds of kernels; else what was chosen."""
        return "auto" if self.asked == "auto" and self.backend == "triton" else self.backend

    @to_keep()
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        done = super()._apply(fn, *args, **kwargs)  # .to(), .half(), .cuda(), .share_memory()
        ChoosesBackend.moves += 1
        self._choose_again()
        return done

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose_again()  # a pickle may come back on another device

    def _choose_again(self) -> None:
        """Only what was left to us: a name that cannot run where the tensors are now is refused at the next call."""
        if getattr(self, "asked", None) == "auto":
            self.choose("auto")
