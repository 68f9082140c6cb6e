"""Pre-training of a small base model: next-token loss on packed documents."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus.kernels.device import to_device
from orthrus.training.batches import TokenStream
from orthrus.training.distributed import Processes
from orthrus.training.loop import autocast, optimise
from orthrus.training.model import TwoViewModel
from orthrus.training.settings import TrainingSettings


class BaseSettings(TrainingSettings):
    """Settings of `orthrus train base`."""

    rows: int = 48
    row_length: int = 2048
    optimizer: str = "muon"
    lr: float = 4e-3
    matrix_lr: float = 0.02
    weight_decay: float = 0.05
    warmup: float = 0.02
    final_lr: float = 0.03
    log_every: int = 50
    save_every: int = 1000
    # Steps between two measurements of the held-out loss, and the rows of each measurement.
    eval_every: int = 1000
    eval_rows: int = 64


def next_token_loss(hidden: Tensor, head: Tensor, rows: Tensor) -> Tensor:
    """Mean nats per token of rows int64 [batch, length + 1] under the AR view's states hidden [batch, length, hidden_size]."""
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: TwoViewModel, rows: Tensor) -> float:
    """Mean nats per token of rows int64 [batch, length + 1]."""
    device = model.head_weight.device
    losses = []
    # The shapes differ from those of training and are rare, so a compilation would not pay.
    with autocast(device), torch.compiler.set_stance("force_eager"):
        for part in rows.to(device).split(8):
            loss = next_token_loss(model(part[:, :-1])[0], model.head_weight, part)
            losses.append(loss * len(part))
    return float(torch.stack(losses).sum() / len(rows))


def train_base(
    model: TwoViewModel,
    train: TokenStream,
    held_out: TokenStream,
    settings: BaseSettings,
    folder: Path,
    processes: Processes,
) -> None:
    """Train `model` in place. Resumes from `folder`/base.pt if there is one. Metrics go to `folder`/base.jsonl."""
    device, length = model.head_weight.device, settings.row_length + 1
    held_out_rows = held_out.even_rows(settings.eval_rows, length)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    loss_of = next_token_loss
    if settings.compile:
        model.compile_layers()
        loss_of = torch.compile(next_token_loss)

    def backward(step: int, rows: range) -> None:
        batch = to_device(
            train.rows(step * settings.rows + rows.start, len(rows), length, settings.seed), device
        )
        with autocast(device):
            loss = loss_of(model(batch[:, :-1])[0], model.head_weight, batch)
        (loss * (len(rows) / settings.rows)).backward()
        sums.add_(torch.stack([loss.detach() * len(rows), loss.new_tensor(len(rows))]))

    def report() -> dict[str, Any]:
        processes.add([sums])
        total, count = sums.tolist()
        sums.zero_()
        return {"loss": total / count}

    optimise(
        dict(model.named_parameters()),
        settings,
        processes,
        folder / "base.pt",
        origin={"model": asdict(model.config)},
        steps_per_epoch=train.per_epoch(length) / settings.rows,
        backward=backward,
        report=report,
        evaluate=lambda: {"held_out_loss": held_out_loss(model, held_out_rows)},
        eval_every=settings.eval_every,
    )
