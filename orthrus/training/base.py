"""Pre-training of a small base model: next-token loss on packed documents."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthrus.training.batches import TokenStream
from orthrus.training.model import TwoViewModel
from orthrus.training.optim import build_optimizers, learning_rate, set_learning_rate
from orthrus.training.progress import Budget, Metrics, load_state, save_state


@dataclass(frozen=True)
class BaseConfig:
    """rows: per optimiser step, in `accumulate` equal parts; row_length in tokens; every_*: optimiser steps."""

    steps: int | None = None
    seconds: float | None = None
    rows: int = 48
    accumulate: int = 1
    row_length: int = 2048
    optimizer: str = "muon"
    lr: float = 4e-3
    matrix_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.02
    final_lr: float = 0.03
    clip: float = 1.0
    compile: bool = True
    log_every: int = 50
    eval_every: int = 1000
    save_every: int = 1000
    eval_rows: int = 64
    seed: int = 0


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on an accelerator; float32 on a CPU, where tests compare bits."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def next_token_loss(model: TwoViewModel, rows: Tensor) -> Tensor:
    """Mean nats per token of rows int64 [batch, length]."""
    hidden, _ = model(rows[:, :-1])
    return F.cross_entropy(model.logits(hidden).float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: TwoViewModel, stream: TokenStream, rows: int, length: int) -> float:
    """Mean nats per token on rows spread evenly over `stream`."""
    device = stream.tokens.device
    losses = []
    for part in stream.even_rows(rows, length + 1).split(8):
        with autocast(device):
            losses.append(next_token_loss(model, part) * len(part))
    return float(torch.stack(losses).sum() / rows)


def train_base(
    model: TwoViewModel, train: TokenStream, held_out: TokenStream, config: BaseConfig, folder: Path
) -> TwoViewModel:
    """Train `model` in place, going on from `folder`/base.pt where there is one. Metrics go to `folder`/base.jsonl."""
    device = train.tokens.device
    named = dict(model.named_parameters())
    optimizers = build_optimizers(
        named,
        kind=config.optimizer,
        lr=config.lr,
        matrix_lr=config.matrix_lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    budget = Budget(config.steps, config.seconds)
    state, metrics = folder / "base.pt", Metrics(folder / "base.jsonl")
    load_state(state, named, optimizers, budget)
    loss_of = torch.compile(next_token_loss) if config.compile else next_token_loss

    def accumulate(step: int) -> Tensor:
        batch = train.rows(config.rows, config.row_length + 1, config.seed, step)
        total = torch.zeros((), device=device)
        for part in batch.chunk(config.accumulate):
            with autocast(device):
                loss = loss_of(model, part) / config.accumulate
            loss.backward()
            total += loss.detach()
        return total

    accumulate(budget.done)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    budget.start()
    tokens_per_step = config.rows * config.row_length
    while not budget.finished:
        set_learning_rate(
            optimizers, learning_rate(budget.progress, warmup=config.warmup, final=config.final_lr)
        )
        loss = accumulate(budget.done)
        norm = nn.utils.clip_grad_norm_(named.values(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        budget.done += 1
        if budget.done % config.log_every == 0 or budget.finished:
            metrics.write(
                step=budget.done,
                seconds=round(budget.elapsed, 1),
                tokens=budget.done * tokens_per_step,
                loss=loss.item(),
                gradient_norm=norm.item(),
                lr=optimizers[-1].param_groups[0]["lr"],
            )
        if budget.done % config.eval_every == 0 or budget.finished:
            value = held_out_loss(model, held_out, config.eval_rows, config.row_length)
            metrics.write(step=budget.done, held_out_loss=value)
        if budget.done % config.save_every == 0:
            save_state(state, named, optimizers, budget)
    save_state(state, named, optimizers, budget)
    return model
