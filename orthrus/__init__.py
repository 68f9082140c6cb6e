"""Orthrus-accelerated Qwen3: several tokens per forward pass, the text of plain autoregressive decoding.

Names are loaded on first use: importing the package costs nothing, so configs, routers and the CLI may do it
freely.
"""

from typing import TYPE_CHECKING

from orthrus.lazy import lazy_names

if TYPE_CHECKING:
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig
    from orthrus.generate.accelerate import accelerate
    from orthrus.requests.request import Request, SamplingParams

__version__ = "0.1.0"

__all__ = ["Engine", "EngineConfig", "Request", "SamplingParams", "__version__", "accelerate"]

__getattr__ = lazy_names(
    __name__,
    {
        "accelerate": "orthrus.generate.accelerate",
        "Engine": "orthrus.engine.engine",
        "EngineConfig": "orthrus.engine.config",
        "Request": "orthrus.requests.request",
        "SamplingParams": "orthrus.requests.request",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
