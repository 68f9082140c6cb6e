"""The engine: requests in, chunks of committed tokens out, one forward pass a step.

Names are loaded on first use, so reading settings (`orthrus.engine.config`) does not import torch.
"""

from typing import TYPE_CHECKING

from orthrus.lazy import lazy_names

if TYPE_CHECKING:
    from orthrus.engine.config import EngineConfig
    from orthrus.engine.engine import Engine

__all__ = ["Engine", "EngineConfig"]

__getattr__ = lazy_names(
    __name__, {"Engine": "orthrus.engine.engine", "EngineConfig": "orthrus.engine.config"}
)
