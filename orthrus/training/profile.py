"""Which ranks the right tokens have in a diffusion block: the acceptance profile of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthrus.engine import Engine
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.schedules.blocks import draft_rows

MAX_RANKS = 8
"""The number of ranks in a profile."""


@dataclass
class _Counts:
    """Counts of right drafts at each depth."""

    tried: list[int] = field(default_factory=list)
    """Blocks whose drafts were all right before this depth."""
    hits: list[list[int]] = field(default_factory=list)
    """By rank, from 0 for the likeliest: in how many of these blocks the right token had this rank."""


def measure_profile(
    engine: Engine, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], source: str
) -> AcceptanceProfile:
    """Draft whole blocks over greedy `texts`, which the engine's AR view has made of `prompts`, and count which were right.

    A block begins where the right drafts of the one before it end, as in decoding. Nothing may run meanwhile. Raises RequestError
    if the cache is too small for a text. source: the profile's `source`.
    """
    model = engine.model_config
    assert model.block_size is not None
    counts = _Counts([0] * (model.block_size - 1), [[0] * MAX_RANKS for _ in range(model.block_size - 1)])
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = [*prompt, *text]
        with engine.scored(tokens) as (_, pages):
            anchor = len(prompt)
            while anchor < len(tokens) - 1:
                ranks = _ranks(engine, tokens, anchor, pages)
                anchor += 1 + _count(counts, ranks)
    return AcceptanceProfile(
        tuple(
            tuple(hit / tried for hit in hits)
            for tried, hits in zip(counts.tried, counts.hits, strict=True)
            if tried
        ),
        source,
    )


def _ranks(engine: Engine, tokens: Sequence[int], anchor: int, pages: list[int]) -> list[int]:
    """The rank of each right token in a block at position `anchor`: 0 if it was the likeliest draft."""
    model = engine.model_config
    assert model.block_size is not None and model.mask_token_id is not None
    right = torch.tensor(tokens[anchor + 1 : anchor + model.block_size], device=engine.device)
    groups = draft_rows(tokens[anchor], model.block_size, anchor, pages, model.mask_token_id, lead=False)
    logits: Tensor = engine.runner.logits(list(groups))[: len(right)].float()
    own = logits.gather(1, right[:, None])
    return [int(rank) for rank in (logits > own).sum(1)]


def _count(counts: _Counts, ranks: Sequence[int]) -> int:
    """Add a block to the counts. Returns how many drafts of its chain were right."""
    for depth, rank in enumerate(ranks):
        counts.tried[depth] += 1
        if rank < MAX_RANKS:
            counts.hits[depth][rank] += 1
        if rank:
            return depth
    return len(ranks)
