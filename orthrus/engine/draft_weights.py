"""Which weights draft passes multiply: those of the AR rows, or rounded copies of their own.

Only verify passes have to be exact, so drafts may be rough. Copies halve what a draft pass reads, and take memory from the KV
cache. With copies, no pass has rows of both views: it would read both sets of weights.
"""

from orthrus.engine.config import EngineConfig
from orthrus.models.config import ModelConfig
from orthrus.schedules.registry import SCHEDULES, choose_schedule

COPY_BYTES = {"fp8": 1 + 4 / 128**2}
"""The formats of copies, with the bytes of one number on a GPU: in "fp8" one, and a float32 scale for each 128 x 128 of them."""


def draft_format(config: EngineConfig, model: ModelConfig) -> str | None:
    """The weight format of the drafts' copies; None if there are no copies."""
    drafts = SCHEDULES[choose_schedule(config.schedule, model.has_diffusion)].needs_diffusion
    return config.draft_weights if drafts and config.draft_weights in COPY_BYTES else None
