"""Diffusion heads for a frozen base (Orthrus, arXiv 2605.12825): the drafts learn the AR view's own distribution."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from orthrus.training.base import autocast
from orthrus.training.blocks import draft_blocks, random_anchors
from orthrus.training.distill import forward_kl
from orthrus.training.model import TwoViewModel
from orthrus.training.optim import build_optimizers, learning_rate, set_learning_rate
from orthrus.training.progress import Budget, Metrics, load_state, save_state


@dataclass(frozen=True)
class HeadsConfig:
    """rows per optimiser step, in `accumulate` equal parts; anchors: blocks per row.

    short_blocks: share of the blocks that are cut to a random length; depth_decay: weight of a row relative to the one
    before it in its block (1 is the paper's); sampled: share of the rows that come from the model's own samples.
    """

    steps: int | None = None
    seconds: float | None = None
    block_size: int = 32
    rows: int = 24
    accumulate: int = 1
    row_length: int = 1024
    anchors: int = 64
    short_blocks: float = 0.0
    depth_decay: float = 1.0
    sampled: float = 1.0
    optimizer: str = "adamw"
    lr: float = 2e-4
    matrix_lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.05
    final_lr: float = 0.1
    clip: float = 1.0
    compile: bool = True
    slice_rows: int = 8192
    log_every: int = 100
    save_every: int = 2000
    seed: int = 0


class RowSource(Protocol):
    """Anything that gives training rows: packed documents, or the model's own samples."""

    def rows(self, count: int, length: int, seed: int, step: int) -> Tensor: ...


def two_views(
    model: TwoViewModel, rows: Tensor, anchors: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of the AR view [batch, length, h] and of blocks at `anchors` [batch, blocks * size, h], the
    blocks' positions and their live rows."""
    config = model.config
    assert config.block_size is not None and config.mask_token_id is not None
    with torch.no_grad():
        hidden, cache = model(rows)
    blocks = draft_blocks(rows, anchors, lengths, config.block_size, config.mask_token_id)
    drafted = model.diffuse(blocks.tokens, blocks.positions, cache, blocks.mask)
    return hidden, drafted, blocks.positions, blocks.live


def train_heads(
    model: TwoViewModel, sources: list[tuple[float, RowSource]], config: HeadsConfig, folder: Path
) -> TwoViewModel:
    """Train the `_diff` weights of `model` in place; every other weight stays as it is, bit for bit.

    sources: row sources with the share of the rows that each gives. Goes on from `folder`/heads.pt where there is one;
    metrics go to `folder`/heads.jsonl: KL in nats, top-1 agreement by depth, and tokens per cycle if depths
    agreed independently of each other.
    """
    device, size = model.head_weight.device, config.block_size
    named = model.diffusion_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    optimizers = build_optimizers(
        named,
        kind=config.optimizer,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    budget = Budget(config.steps, config.seconds)
    state, metrics = folder / "heads.pt", Metrics(folder / "heads.jsonl")
    load_state(state, named, optimizers, budget)
    forward = torch.compile(two_views) if config.compile else two_views
    depth_weight = config.depth_decay ** torch.arange(size, device=device).float()
    depth_weight *= size / depth_weight.sum()
    per_part = config.rows // config.accumulate
    counts = [round(share * per_part) for share, _ in sources]
    counts[0] += per_part - sum(counts)

    def part(step: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one part of a step: mean KL, agreement by depth [size], live rows by depth [size]."""
        key = step * config.accumulate + index
        rows = torch.cat(
            [
                s.rows(n, config.row_length, config.seed, key)
                for n, (_, s) in zip(counts, sources, strict=True)
                if n
            ]
        )
        generator = torch.Generator().manual_seed((config.seed << 40) + key)
        anchors = random_anchors(per_part, config.anchors, config.row_length, size, generator)
        lengths = torch.randint(2, size + 1, anchors.shape, generator=generator)
        whole = torch.rand(anchors.shape, generator=generator) >= config.short_blocks
        lengths = torch.where(whole, size, lengths)
        with autocast(device):
            hidden, drafted, positions, live = forward(model, rows, anchors.to(device), lengths.to(device))
            with torch.no_grad():
                targets = model.logits(hidden).flatten(0, 1)
                head = model.head_weight.to(targets.dtype)
        index_of = (positions + torch.arange(per_part, device=device)[:, None] * config.row_length).flatten()
        weight = live.flatten() * depth_weight.repeat(per_part * config.anchors) / live.sum()
        with torch.autocast(device.type, enabled=False):
            loss, kl, agree = forward_kl(
                drafted.flatten(0, 1).to(targets.dtype),
                targets,
                index_of,
                head,
                weight,
                slice_rows=config.slice_rows,
                compiled=config.compile,
            )
        (loss / config.accumulate).backward()
        lived = live.view(-1, size).float()
        return (kl * live.flatten()).sum() / live.sum(), (agree.view(-1, size) * lived).sum(0), lived.sum(0)

    part(budget.done, 0)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    budget.start()
    agreed, counted = torch.zeros(size, device=device), torch.zeros(size, device=device)
    while not budget.finished:
        set_learning_rate(
            optimizers, learning_rate(budget.progress, warmup=config.warmup, final=config.final_lr)
        )
        total = torch.zeros((), device=device)
        for index in range(config.accumulate):
            kl, agree, lived = part(budget.done, index)
            total += kl / config.accumulate
            agreed += agree
            counted += lived
        nn.utils.clip_grad_norm_(named.values(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        budget.done += 1
        if budget.done % config.log_every == 0 or budget.finished:
            by_depth = agreed / counted.clamp(min=1)
            metrics.write(
                step=budget.done,
                seconds=round(budget.elapsed, 1),
                kl=total.item(),
                tokens_per_cycle=1 + by_depth[: size - 1].cumprod(0).sum().item(),
                agreement=[round(v, 3) for v in by_depth.tolist()],
            )
            agreed.zero_()
            counted.zero_()
        if budget.done % config.save_every == 0:
            save_state(state, named, optimizers, budget)
    save_state(state, named, optimizers, budget)
    return model
