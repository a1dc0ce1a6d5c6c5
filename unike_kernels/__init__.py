"""UniKE knowledge editing for PyTorch models: operators, modules and an editor.

Importing the package changes nothing and loads nothing: each name below is imported from its module at first use.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, reference
    from .config import EncoderConfig, NeuronConfig, RoutingConfig, ShiftConfig, UnikeConfig
    from .editing.editor import Editor
    from .edits import Edits
    from .models import UnsupportedModelError
    from .patching import PatchHandle, patch, status, unpatch

__version__ = "0.1.0"

__all__ = [
    "Editor",
    "Edits",
    "EncoderConfig",
    "NeuronConfig",
    "PatchHandle",
    "RoutingConfig",
    "ShiftConfig",
    "UnikeConfig",
    "UnsupportedModelError",
    "ops",
    "patch",
    "reference",
    "status",
    "unpatch",
]

if importlib.util.find_spec("torch") is None:
    raise ImportError(
        "unike_kernels needs PyTorch 2.6 or newer, and leaves the choice of a build to you. With an NVIDIA GPU: "
        "pip install torch. Without one: the CPU command of PyTorch's install page."
    )

_SUBMODULES = ("ops", "reference")
_HOMES = {
    "Editor": "editing.editor",
    "Edits": "edits",
    "EncoderConfig": "config",
    "NeuronConfig": "config",
    "PatchHandle": "patching",
    "RoutingConfig": "config",
    "ShiftConfig": "config",
    "UnikeConfig": "config",
    "UnsupportedModelError": "models",
    "patch": "patching",
    "status": "patching",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
