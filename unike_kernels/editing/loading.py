"""Models and processors by name, as the command line needs them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[nn.Module, Any]:
    """(model in evaluation mode, processor) of a folder or a hub name, by whatever class of transformers fits it.

    device: "auto" is a CUDA device where there is one. dtype: "float32", "bfloat16", "float16", or "auto": the
    checkpoint's own, but float32 on a CPU, where half precision is many times slower. ValueError for other words, and
    for a device that is not there; OSError for a name that is no folder and of no model on the hub.
    """
    import transformers

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, but is {dtype!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    kind: Any = DTYPES.get(dtype, torch.float32 if torch.device(device).type == "cpu" else "auto")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise
        raise OSError(f"there is no folder {name!r} in {Path.cwd()}, nor can a hub's model be had: {error}") from None
    named = [getattr(transformers, n, None) for n in config.architectures or ()]
    classes = [c for c in named if c is not None and hasattr(c, "generate")]
    chosen = (classes or [transformers.AutoModelForImageTextToText])[0]
    model = chosen.from_pretrained(name, dtype=kind).to(device).eval()
    return model, transformers.AutoProcessor.from_pretrained(name)
