"""Orthrus-accelerated Qwen3: several tokens per forward pass, the text of plain autoregressive decoding.

Names are loaded on first use: importing the package costs nothing, so configs, routers and the CLI may do it
freely.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig
    from orthrus.generate.accelerate import accelerate
    from orthrus.requests.request import Request, SamplingParams

__version__ = "0.1.0"

__all__ = ["Engine", "EngineConfig", "Request", "SamplingParams", "__version__", "accelerate"]

_MODULES = {
    "accelerate": "orthrus.generate.accelerate",
    "Engine": "orthrus.engine.engine",
    "EngineConfig": "orthrus.engine.config",
    "Request": "orthrus.requests.request",
    "SamplingParams": "orthrus.requests.request",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
