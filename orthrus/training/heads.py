"""Diffusion heads for a frozen base (Orthrus, arXiv 2605.12825): the drafts learn the AR view's own distribution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor

from orthrus.kernels.device import to_device
from orthrus.training.batches import TokenStream, mixed_rows
from orthrus.training.blocks import DraftBlocks
from orthrus.training.distributed import Processes
from orthrus.training.drafts import DraftLoss, DraftSettings
from orthrus.training.loop import autocast, optimise
from orthrus.training.model import TwoViewModel
from orthrus.training.settings import FrozenBaseSettings


class HeadsSettings(DraftSettings, FrozenBaseSettings):
    """Settings of `orthrus train heads`."""

    # None: the tokenizer's mask token.
    mask_token_id: int | None = None
    lr: float = 2e-4
    # Keep only the layers' inputs for the backward pass, and run each layer again there. It takes a quarter more time, and a
    # tenth of the memory.
    recompute: bool = False

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

    sources: streams, each with its number of rows in a step; `settings.rows` in all. origin: plain values that identify
    the base model and the texts. If there is `folder`/heads.pt, training resumes from it. Metrics of `DraftLoss` go to
    `folder`/heads.jsonl.
    """
    device, length = model.head_weight.device, settings.row_length
    if settings.compile:
        model.compile_layers()
    drafts = DraftLoss(
        model, settings, rows=settings.rows, length=length, seed=settings.seed, compiled=settings.compile
    )

    tokens = mixed_rows(sources, length, settings.seed)

    def backward(step: int, rows: range) -> None:
        batch = to_device(tokens(step, rows), device)
        blocks = drafts.blocks(step, rows, batch)
        with autocast(device):
            hidden, drafted = two_views(model, batch, blocks, settings.recompute)
        drafts(hidden, drafted, blocks).backward()

    optimise(
        model.diffusion_parameters(),
        settings,
        processes,
        folder / "heads.pt",
        origin=origin or {},
        steps_per_epoch=steps_per_epoch,
        backward=backward,
        report=lambda: drafts.report(processes),
    )
