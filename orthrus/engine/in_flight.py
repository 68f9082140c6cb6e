"""`InFlight`: what the engine keeps of a pass from its launch until its picks are read."""

from dataclasses import dataclass

from orthrus.engine.scheduler import Planned
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows


@dataclass(slots=True)
class InFlight:
    """A pass whose picks have not been read."""

    planned: list[Planned]
    rows: list[PickRows]
    """How its picks are made."""
    launched: LaunchedPass
    ahead: bool
    """Whether its sequences have gone on with placeholders, so that the next pass can be launched before it is over."""
    begin: float
    """When it was launched, in seconds; for the observer."""
