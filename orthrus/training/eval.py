"""What the drafts are worth: agreement by depth and tokens per cycle, simulated on the model's own text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthrus.training.base import autocast
from orthrus.training.blocks import draft_blocks
from orthrus.training.data import gumbel, pick, sample
from orthrus.training.model import TwoViewModel


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss on `rows` rows; drafts on `prompts` held-out prompts continued by `new_tokens`."""

    rows: int = 128
    row_length: int = 2048
    prompts: int = 64
    prompt_length: int = 64
    new_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    block_rows: tuple[int, ...] = (4, 6, 8, 12, 16)
    shown: int = 10


@dataclass(frozen=True)
class DraftReport:
    """tokens_per_cycle: committed by one draft and verify pass; agreement: share of drafts at each depth that are the
    AR pick, whatever came before; distinct: share of the 8-grams of a text that occur once or first."""

    temperature: float
    block_rows: int
    tokens_per_cycle: float
    agreement: list[float]
    distinct: float


@torch.no_grad()
def draft_table(
    model: TwoViewModel, rows: Tensor, start: int, block_rows: int, temperature: float, seed: int
) -> Tensor:
    """Drafts int64 [batch, anchors, block_rows - 1] at every anchor start..length - 1 of `rows` [batch, length]."""
    assert model.config.mask_token_id is not None
    device, (batch, length) = rows.device, rows.shape
    padded = torch.nn.functional.pad(rows, (0, block_rows))
    tables = []
    with autocast(device):
        _, cache = model(padded)
        for first in range(start, length, 64):
            anchors = torch.arange(first, min(first + 64, length), device=device).expand(batch, -1)
            lengths = torch.full_like(anchors, block_rows)
            blocks = draft_blocks(padded, anchors, lengths, block_rows, model.config.mask_token_id)
            hidden = model.diffuse(blocks.tokens, blocks.positions, cache, blocks.mask)
            logits = model.logits(hidden).view(batch, anchors.shape[1], block_rows, -1)[:, :, :-1]
            noise = None
            if temperature:
                # The draft at depth d of anchor n is for position n + d + 1.
                window = torch.stack(
                    [
                        gumbel((batch, logits.shape[-1]), p, seed, device)
                        for p in range(first + 1, int(anchors[0, -1]) + block_rows)
                    ],
                    1,
                )
                noise = window.unfold(1, block_rows - 1, 1).transpose(2, 3)
            tables.append(pick(logits, temperature, noise))
    return torch.cat(tables, 1)


def count_cycles(text: list[int], drafts: list[list[int]], start: int) -> int:
    """Cycles that commit text[start + 1:], with drafts[n - start] the block at anchor n."""
    n, cycles, last = start, 0, len(text) - 1
    while n < last:
        accepted = 0
        for draft in drafts[n - start]:
            if n + 1 + accepted > last or draft != text[n + 1 + accepted]:
                break
            accepted += 1
        n += accepted + 1
        cycles += 1
    return cycles


def distinct_ngrams(text: list[int], n: int = 8) -> float:
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def evaluate(
    model: TwoViewModel,
    prompts: Tensor,
    *,
    new_tokens: int,
    temperature: float,
    block_rows: list[int],
    seed: int = 1,
    batch: int = 8,
) -> tuple[list[DraftReport], Tensor]:
    """Continue `prompts` int64 [count, length] and replay the text with drafts of each block length.

    Returns one report per block length, and the texts.
    """
    start = prompts.shape[1] - 1
    reports, texts = [], []
    per_length: dict[int, tuple[list[int], list[Any]]] = {rows: ([0, 0], []) for rows in block_rows}
    for part in prompts.split(batch):
        text = sample(model, part, part.shape[1] + new_tokens, temperature, seed)
        texts.append(text)
        for rows, (counts, agreements) in per_length.items():
            table = draft_table(model, text, start, rows, temperature, seed)
            inside = text.shape[1] - start - rows
            truth = text[:, start + 1 :].unfold(1, rows - 1, 1)[:, :inside]
            agreements.append((table[:, :inside] == truth).float().mean((0, 1)))
            for sequence, drafts in zip(text.tolist(), table.tolist(), strict=True):
                counts[0] += new_tokens
                counts[1] += count_cycles(sequence, drafts, start)
    whole = torch.cat(texts)
    distinct = sum(distinct_ngrams(t[start + 1 :]) for t in whole.tolist()) / len(whole)
    for rows, (counts, agreements) in per_length.items():
        agreement = [round(v, 3) for v in torch.stack(agreements).mean(0).tolist()]
        reports.append(DraftReport(temperature, rows, counts[0] / counts[1], agreement, round(distinct, 3)))
    return reports, whole
