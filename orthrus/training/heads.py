"""Diffusion heads for a frozen base (Orthrus, arXiv 2605.12825): the drafts learn the AR view's own distribution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from orthrus.training.batches import TokenStream
from orthrus.training.blocks import DraftBlocks, draft_blocks, random_anchors
from orthrus.training.distill import forward_kl
from orthrus.training.distributed import Processes
from orthrus.training.loop import autocast, optimise
from orthrus.training.model import TwoViewModel
from orthrus.training.settings import TrainingSettings


class HeadsSettings(TrainingSettings):
    """anchors: blocks per row of tokens; mask_token_id: None for the tokenizer's own mask token.

    short_blocks: share of the blocks that are cut to a random length; depth_decay: weight of a row relative to the one
    before it in its block (1 is the paper's); sampled: share of the rows that come from the model's own answers, the
    rest being corpus; epochs count the answers. recompute: keep only layer inputs for the backward pass and run each
    layer again there, a quarter more time for a tenth of the memory.
    """

    block_size: int = 32
    mask_token_id: int | None = None
    rows: int = 24
    row_length: int = 1024
    anchors: int = 64
    short_blocks: float = 0.0
    depth_decay: float = 1.0
    sampled: float = 1.0
    optimizer: str = "adamw"
    lr: float = 2e-4
    matrix_lr: float = 5e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    final_lr: float = 0.1
    recompute: bool = False
    log_every: int = 100
    save_every: int = 2000

    @model_validator(mode="after")
    def _blocks_fit(self) -> "HeadsSettings":
        if self.anchors > self.row_length - self.block_size + 1:
            raise ValueError(
                f"{self.anchors} anchors with blocks of {self.block_size} don't fit a row of {self.row_length}: "
                "lower anchors or raise row_length"
            )
        return self


def two_views(
    model: TwoViewModel, rows: Tensor, blocks: DraftBlocks, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Hidden states of the AR view [batch, length, hidden_size] and of `blocks` [batch, block rows, hidden_size]."""
    with torch.no_grad():
        hidden, cache = model(rows)
    return hidden, model.diffuse(blocks, cache, recompute)


class _Sums:
    """What a run of steps adds up to: KL in nats, top-1 agreement by depth, leading rows of a block that agree."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.all = torch.zeros(2 * size + 3, dtype=torch.float64, device=device)
        self._kl, self._agreed, self._counted, self._blocks = self.all.split([1, size, size, 2])

    def add(self, kl: Tensor, agree: Tensor, live: Tensor) -> None:
        """kl float [blocks, size], agree and live bool [blocks, size]."""
        agree = agree & live
        # The last row's draft could not be verified in its own block: it is trained, and never used.
        leading = agree[:, :-1].long().cumprod(1).sum(1)
        whole = live.all(1)
        self._kl += (kl * live).sum()
        self._agreed += agree.sum(0)
        self._counted += live.sum(0)
        self._blocks += torch.stack([(leading * whole).sum(), whole.sum()])

    def report(self) -> dict[str, Any]:
        agreement = self._agreed / self._counted.clamp(min=1)
        leading, blocks = self._blocks.tolist()
        values = {
            "kl": self._kl.item() / self._counted.sum().item(),
            "tokens_per_cycle": 1 + leading / max(1, blocks),
            "agreement": [round(v, 3) for v in agreement.tolist()],
        }
        self.all.zero_()
        return values


def train_heads(
    model: TwoViewModel,
    sources: Sequence[tuple[int, TokenStream]],
    settings: HeadsSettings,
    folder: Path,
    processes: Processes,
    *,
    steps_per_epoch: float = 0.0,
    origin: dict[str, Any] | None = None,
) -> None:
    """Train the `_diff` weights of `model` in place; every other weight stays as it is, bit for bit.

    sources: streams with the rows that each gives to a step, `settings.rows` in all. origin: what tells this base model
    and these texts from others, as plain values. Goes on from `folder`/heads.pt where there is one. Metrics go to
    `folder`/heads.jsonl: KL in nats, top-1 agreement by depth, and the tokens per cycle that this predicts for text that
    is the model's greedy own.
    """
    device, size, length = model.head_weight.device, settings.block_size, settings.row_length
    mask_token_id = model.config.mask_token_id
    assert mask_token_id is not None
    forward = torch.compile(two_views) if settings.compile else two_views
    depth_weight = settings.depth_decay ** torch.arange(size, device=device).float()
    depth_weight *= size / depth_weight.sum()
    sums = _Sums(size, device)

    def tokens(step: int, rows: range) -> Tensor:
        """Rows of a step, int64 [rows, length]: those of the first source come first."""
        parts, before = [], 0
        for count, source in sources:
            wanted = range(max(rows.start - before, 0), min(rows.stop - before, count))
            if wanted:
                parts.append(source.rows(step * count + wanted.start, len(wanted), length, settings.seed))
            before += count
        return torch.cat(parts).to(device)

    def blocks_of(step: int) -> tuple[Tensor, Tensor]:
        """Anchors and lengths int64 [rows, anchors] of all of a step's blocks, on the host."""
        generator = torch.Generator().manual_seed((settings.seed << 40) + step)
        anchors = random_anchors(settings.rows, settings.anchors, length, size, generator)
        lengths = torch.randint(2, size + 1, anchors.shape, generator=generator)
        whole = torch.rand(anchors.shape, generator=generator) >= settings.short_blocks
        return anchors, torch.where(whole, size, lengths)

    def backward(step: int, rows: range) -> None:
        anchors, lengths = blocks_of(step)
        part, batch = slice(rows.start, rows.stop), tokens(step, rows)
        blocks = draft_blocks(batch, anchors[part].to(device), lengths[part].to(device), size, mask_token_id)
        with autocast(device):
            hidden, drafted = forward(model, batch, blocks, settings.recompute)
            with torch.no_grad():
                targets = model.logits(hidden).flatten(0, 1)
                head = model.head_weight.to(targets.dtype)
        index = (blocks.positions + torch.arange(len(rows), device=device)[:, None] * length).flatten()
        live = blocks.live.flatten(0, 1)
        weight = (live * depth_weight).flatten() / int(lengths.sum())
        with torch.autocast(device.type, enabled=False):
            loss, kl, agree = forward_kl(
                drafted.flatten(0, 1).to(targets.dtype),
                targets,
                index,
                head,
                weight,
                compiled=settings.compile,
            )
        loss.backward()
        sums.add(kl.view(-1, size), agree.view(-1, size), live)

    def report() -> dict[str, Any]:
        processes.add([sums.all])
        return sums.report()

    optimise(
        model.diffusion_parameters(),
        settings,
        processes,
        folder / "heads.pt",
        origin=origin or {},
        steps_per_epoch=steps_per_epoch,
        backward=backward,
        report=report,
    )
