"""The engine: requests in, chunks of committed tokens out, one forward pass a step.

Names are loaded on first use: whoever only reads settings (`orthrus.engine.config`) does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus.engine.config import EngineConfig
    from orthrus.engine.engine import Engine

__all__ = ["Engine", "EngineConfig"]

_MODULES = {"Engine": "orthrus.engine.engine", "EngineConfig": "orthrus.engine.config"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
