"""How often drafts are right: a profile by depth and rank, which benchmarks replay."""

import json
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

from orthrus.errors import ConfigError


@dataclass(frozen=True)
class AcceptanceProfile:
    """Chances that drafts are right. What lies deeper than the profile is as its last depth."""

    chances: tuple[tuple[float, ...], ...]
    """For the first draft after the newest token, the second, ...: the chances that the right token is the block's likeliest one,
    its second likeliest one, ..., if all tokens before it were drafted right. Each adds up to at most 1."""
    source: str
    """Where the chances come from, as reports tell it."""

    @staticmethod
    def constant(chance: float) -> "AcceptanceProfile":
        """The same chance at every depth, and none for a token that is not the likeliest."""
        return AcceptanceProfile(((chance,),), "the same chance at every depth")

    @staticmethod
    def read(file: Path) -> "AcceptanceProfile":
        """What `write` wrote. Raises ConfigError for a file that is none, or has impossible chances."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            chances = tuple(tuple(map(float, depth)) for depth in found["chances"])
            source = str(found["source"])
        except OSError as error:
            raise ConfigError(f"{file} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{file} is no acceptance profile: write one with `orthrus train eval CONFIG --profile FILE`"
            ) from None
        if not chances or not all(depth and min(depth) >= 0 and sum(depth) <= 1.001 for depth in chances):
            raise ConfigError(f"{file}: the chances of each depth must be at least 0 and add up to at most 1")
        return AcceptanceProfile(chances, source)

    def write(self, file: Path) -> None:
        """Write the profile as JSON."""
        chances = [[round(chance, 4) for chance in depth] for depth in self.chances]
        file.write_text(
            json.dumps({"source": self.source, "chances": chances}, indent=1) + "\n", encoding="utf-8"
        )

    def at(self, depth: int) -> tuple[float, ...]:
        """The chances by rank at a depth. 0 is the first draft's."""
        return self.chances[min(depth, len(self.chances) - 1)]

    def reached(self, depths: int) -> list[float]:
        """For 1, 2, ... `depths`: the chance that so many drafts of a chain are right."""
        return list(accumulate((self.at(depth)[0] for depth in range(depths)), mul))

    def tokens_per_cycle(self, block_rows: int) -> float:
        """What a cycle with a chain of `block_rows` rows, and so one draft less, commits on average."""
        return 1.0 + sum(self.reached(block_rows - 1))

    def scaled(self, tokens_per_cycle: float, block_rows: int) -> "AcceptanceProfile":
        """The profile of a drafter that brings so many tokens per cycle with a chain of `block_rows` rows.

        Each depth's chance of the likeliest token is raised to one common power. The chances of the other ranks keep their share
        of what is left. Raises ConfigError for what no block of so many rows can bring.
        """
        if not 1.0 < tokens_per_cycle < block_rows:
            raise ConfigError(
                f"tokens per cycle must be over 1 and below the block's {block_rows} rows, got {tokens_per_cycle:g}"
            )
        low, high = 2.0**-20, 2.0**20
        for _ in range(80):
            middle = (low * high) ** 0.5
            if self._to_the(middle).tokens_per_cycle(block_rows) > tokens_per_cycle:
                low = middle
            else:
                high = middle
        return AcceptanceProfile(self._to_the(low).chances, f"{self.source}, scaled to {tokens_per_cycle:g}")

    def _to_the(self, power: float) -> "AcceptanceProfile":
        scaled = []
        for first, *others in self.chances:
            # A chance of 0 or 1 could not be scaled.
            first = min(max(first, 1e-6), 1 - 1e-6)
            raised = first**power
            share = (1 - raised) / (1 - first)
            scaled.append((raised, *(min(1.0, chance * share) for chance in others)))
        return AcceptanceProfile(tuple(scaled), self.source)


def chain_profile(tokens_per_cycle: float, block_rows: int) -> AcceptanceProfile:
    """The constant chance with which a chain of `block_rows` rows brings so many tokens per cycle. Raises ConfigError."""
    return AcceptanceProfile.constant(0.5).scaled(tokens_per_cycle, block_rows)
