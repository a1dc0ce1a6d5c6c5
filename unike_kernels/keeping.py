"""What a patch makes to keep does not hang on the modes of whoever called: inference mode, gradients, autocast."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def to_keep() -> Iterator[None]:
    """Inside, tensors are made without gradients, exactly and to be written to later, whatever the caller's modes.

    What is made in inference mode refuses to be changed outside of it; what autocast makes is of half precision.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
