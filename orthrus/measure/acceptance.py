"""How often drafts are right: a profile by depth and rank, which benchmarks replay."""

import json
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path

from orthrus.errors import ConfigError


@dataclass(frozen=True)
class AcceptanceProfile:
    """Chances that drafts are right. Depths beyond the profile have the chances of its last depth."""

    chances: tuple[tuple[float, ...], ...]
    """By depth, and then by rank: the chance that the right token is the draft of this rank, if all tokens before it were drafted
    right. Depth 0 is the first draft after the newest token. The chances of a depth add up to at most 1."""
    source: str
    """Where the chances come from, for reports."""

    @staticmethod
    def constant(chance: float) -> "AcceptanceProfile":
        """The same chance at every depth, and none for a token that is not the likeliest."""
        return AcceptanceProfile(((chance,),), "the same chance at every depth")

    @staticmethod
    def read(file: Path) -> "AcceptanceProfile":
        """Read a profile that `write` wrote. Raises ConfigError for any other file, or for impossible chances."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            chances = tuple(tuple(map(float, depth)) for depth in found["chances"])
            source = str(found["source"])
        except OSError as error:
            raise ConfigError(f"{file} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{file} is not an acceptance profile: write one with `orthrus train eval CONFIG --profile FILE`"
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
        """The chance that the first 1, 2, ... `depths` drafts of a chain are all right."""
        return list(accumulate((self.at(depth)[0] for depth in range(depths)), mul))

    def tokens_per_cycle(self, block_rows: int) -> float:
        """Average tokens that a cycle commits with a chain of `block_rows` rows, which has one draft less than rows."""
        return 1.0 + sum(self.reached(block_rows - 1))

    def scaled(self, tokens_per_cycle: float, block_rows: int) -> "AcceptanceProfile":
        """This profile, scaled to give `tokens_per_cycle` with a chain of `block_rows` rows.

        Each depth's chance of the likeliest token is raised to the same power. The chances of the other ranks keep their share of
        the rest. Raises ConfigError if no block of so many rows can give so many tokens.
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
    """The profile with a constant chance that gives `tokens_per_cycle` with a chain of `block_rows` rows. Raises ConfigError."""
    return AcceptanceProfile.constant(0.5).scaled(tokens_per_cycle, block_rows)
