"""All schedules by name, for the engine's `schedule` setting, the command line and `orthrus verify`.

A schedule's code, and torch, are loaded only when the schedule is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orthrus.errors import ConfigError

AUTO = "auto"
"""The setting that chooses the first registered schedule that a model can run."""
AR = "ar"
"""The schedule of plain decoding. Every engine offers it beside its own."""
NGRAM = "ngram"
"""The schedule of drafts that are looked up."""
MEDUSA = "medusa"
"""The schedule of drafts that Medusa heads make. "auto" never chooses it."""


@dataclass(frozen=True)
class Variant:
    """Settings under which the drift check (`orthrus verify`) runs a schedule, besides the default ones."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig`."""
    logprobs: bool = True
    """Whether requests ask for logprobs. Without them, a pass can be launched before the picks of the one before it are read."""


@dataclass(frozen=True)
class ScheduleEntry:
    """One schedule."""

    factory: str
    """The schedule's class, as "module:class": it is imported when it is first used. See `ScheduleFactory`."""
    needs_diffusion: bool = False
    """Whether it runs only checkpoints that have diffusion weights."""
    needs_medusa: bool = False
    """Whether it runs only models that have Medusa heads."""
    settings: frozenset[str] = frozenset()
    """Fields of `EngineConfig` that are refused with schedules that do not list them.

    A schedule whose drafts come from the diffusion view lists `draft_weights`: only then are copies of the weights made.
    """
    parts: tuple[str, ...] = ()
    """Schedules that it is made of: a request may choose one of these for itself."""
    variants: tuple[Variant, ...] = (Variant("ahead", logprobs=False),)
    """What to verify beyond the default settings."""

    def fits(self, has_diffusion: bool, has_medusa: bool = False) -> bool:
        """Whether it can run a model with or without diffusion weights and Medusa heads."""
        return (has_diffusion or not self.needs_diffusion) and (has_medusa or not self.needs_medusa)


_LOOKUP = frozenset({"prompt_lookup_max", "prompt_lookup_min"})

SCHEDULES: dict[str, ScheduleEntry] = {
    "orthrus": ScheduleEntry(
        "orthrus.schedules.ngram:OrthrusNgramSchedule",
        needs_diffusion=True,
        settings=frozenset({"draft_length", "draft_lead", "draft_tree", "draft_weights", *_LOOKUP}),
        parts=(NGRAM,),
        variants=(
            Variant("lead", {"draft_lead": True}),
            Variant("ahead", {"draft_lead": True}, logprobs=False),
            Variant("tree", {"draft_tree": 32, "draft_lead": True}),
            Variant("tree ahead", {"draft_tree": 24}, logprobs=False),
            Variant("adaptive", {"adaptive_draft": True}, logprobs=False),
            Variant("fp8 drafts", {"draft_weights": "fp8"}),
            Variant("fp8 drafts ahead", {"draft_weights": "fp8", "adaptive_draft": True}, logprobs=False),
            Variant("int4 drafts", {"draft_weights": "int4"}),
        ),
    ),
    NGRAM: ScheduleEntry(
        "orthrus.schedules.ngram:NgramSchedule",
        settings=frozenset({"draft_length", *_LOOKUP}),
        variants=(
            Variant("ahead", logprobs=False),
            Variant("adaptive", {"adaptive_draft": True}, logprobs=False),
        ),
    ),
    MEDUSA: ScheduleEntry(
        "orthrus.schedules.medusa:MedusaSchedule",
        needs_medusa=True,
        settings=frozenset({"draft_length", "medusa_heads"}),
        variants=(
            Variant("ahead", logprobs=False),
            Variant("adaptive", {"adaptive_draft": True}, logprobs=False),
        ),
    ),
    AR: ScheduleEntry("orthrus.schedules.ar:ARSchedule"),
}
"""In the order in which "auto" tries them."""


def schedule_choices() -> list[str]:
    """The values of the `schedule` setting."""
    return [AUTO, *sorted(SCHEDULES)]


def schedule_settings() -> set[str]:
    """The fields of `EngineConfig` that have a meaning with some schedules only."""
    return set().union(*(entry.settings for entry in SCHEDULES.values()))


def choose_schedule(setting: str, has_diffusion: bool, lookups: bool = True) -> str:
    """The name of the schedule that `setting` means for a model with or without diffusion weights. Raises ConfigError.

    lookups: whether drafts may be looked up.
    """
    if setting == AUTO:
        return next(
            name
            for name, entry in SCHEDULES.items()
            if entry.fits(has_diffusion) and (lookups or name != NGRAM)
        )
    if setting not in SCHEDULES:
        raise ConfigError(f"schedule {setting!r} is not known: use one of {', '.join(schedule_choices())}")
    return setting
