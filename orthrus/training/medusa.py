"""Medusa heads for a frozen base (Cai et al., 2024, arXiv 2401.10774): head k learns the token k places after the next one.

As in Medusa-1, the base is frozen and all heads are trained together, head k with a weight of `decay` ** k. The loss is the
forward KL from the AR view's distribution at the position that a head drafts for. Diffusion heads are trained with the same loss
on the same texts. Medusa-1's own loss is cross-entropy with the text. On texts that the model has sampled, it has its minimum at
the same place, and is noisier.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from orthrus.kernels.device import to_device
from orthrus.models.medusa_config import MOST_HEADS, MedusaConfig
from orthrus.training.batches import TokenStream, mixed_rows
from orthrus.training.distributed import Processes
from orthrus.training.loop import autocast, optimise
from orthrus.training.model import TwoViewModel
from orthrus.training.settings import FrozenBaseSettings

_SLICE_LOGITS = 1 << 26
"""Logits that are computed at once: 256 MB in float32, and a few times as much with their gradient."""


class MedusaSettings(FrozenBaseSettings):
    """Settings of `orthrus train medusa`."""

    num_heads: int = Field(default=5, ge=1, le=MOST_HEADS)
    # Whether each head has a vocabulary projection of its own, as in Medusa-1. It starts as a copy of the LM head. If not, the
    # heads share the frozen LM head.
    own_projections: bool = True
    # Head k has a weight of decay ** k in the loss. 0.8 is Medusa-1's.
    decay: float = 0.8
    lr: float = 1e-3
    compile: bool = False


def initial_heads(model: TwoViewModel, config: MedusaConfig) -> dict[str, nn.Parameter]:
    """The heads' parameters by name, on the model's device. At first, each head computes the same as the LM head."""
    head = model.head_weight.detach()
    return {
        name: nn.Parameter(
            head.float().clone()
            if name.endswith("projection.weight")
            else torch.zeros(shape, device=head.device)
        )
        for name, shape in config.tensor_shapes().items()
    }


class _MeanKL(torch.autograd.Function):
    """The mean forward KL of drafts from the AR view, for one slice of rows at a time.

    Gradients are computed together with the loss: keeping the logits of all rows would need more memory than everything else.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, projection: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """states [rows, hidden_size] of a head, projection [vocab_size, hidden_size], targets [rows, vocab_size]: AR logits.

        Returns the mean KL in nats, and top-1 agreement, bool [rows].
        """
        size = max(1, _SLICE_LOGITS // len(projection))
        of_states, agree = torch.empty_like(states), []
        of_projection = torch.zeros_like(projection) if ctx.needs_input_grad[1] else None
        total = states.new_zeros((), dtype=torch.float32)
        for part, wanted, out in zip(
            states.split(size), targets.split(size), of_states.split(size), strict=True
        ):
            student, teacher = (
                F.log_softmax(logits.float(), -1) for logits in (F.linear(part, projection), wanted)
            )
            probability = teacher.exp()
            total += (probability * (teacher - student)).sum()
            gradient = ((student.exp() - probability) / len(states)).to(part.dtype)
            out.copy_(gradient @ projection)
            if of_projection is not None:
                of_projection += gradient.mT @ part
            agree.append(student.argmax(-1) == teacher.argmax(-1))
        ctx.save_for_backward(of_states, of_projection)
        found = torch.cat(agree)
        ctx.mark_non_differentiable(found)
        return total / len(states), found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * upstream[0].to(g.dtype) for g in ctx.saved_tensors), None


class MedusaLoss:
    """Loss and metrics of a run's steps."""

    def __init__(self, model: TwoViewModel, heads: dict[str, nn.Parameter], settings: MedusaSettings) -> None:
        self._model, self._heads, self._settings = model, heads, settings
        count = settings.num_heads
        self._sums = torch.zeros(count + 3, dtype=torch.float64, device=model.head_weight.device)
        self._agreed, self._right, self._kl, self._count = self._sums.split([count, 1, 1, 1])

    def __call__(self, rows: Tensor) -> Tensor:
        """The mean loss over the positions of rows int64 [batch, length] at which all heads have a token to draft."""
        settings = self._settings
        heads, shared = self._heads, self._model.head_weight
        losses: list[Tensor] = []
        with autocast(rows.device):
            with torch.no_grad():
                hidden = self._model(rows)[0]
                # Head k drafts from position t what the AR view picks at t + k.
                targets = self._model.logits(hidden[:, 1:])
            own, count = hidden[:, : -settings.num_heads].flatten(0, 1), settings.num_heads
            right = torch.ones(len(own), dtype=torch.bool, device=rows.device)
            for k in range(count):
                states = own + F.silu(F.linear(own, heads[f"medusa.{k}.linear.weight"]))
                projection = heads.get(f"medusa.{k}.projection.weight", shared).to(states.dtype)
                wanted = targets[:, k : targets.shape[1] - count + 1 + k].flatten(0, 1)
                kl, agree = _MeanKL.apply(states, projection, wanted)
                losses.append(settings.decay ** (k + 1) * kl)
                right &= agree
                self._agreed[k] += agree.sum()
                self._right += right.sum()
                self._kl += kl.detach() * len(own) / count
        self._count += len(own)
        return torch.stack(losses).sum()

    def report(self, processes: Processes) -> dict[str, Any]:
        """Metrics since the last call: mean KL in nats, top-1 agreement by head, and the tokens per cycle that a chain of drafts
        would give on the model's own greedy text."""
        processes.add([self._sums])
        *agreed, right, kl, count = self._sums.tolist()
        self._sums.zero_()
        count = max(1.0, count)
        return {
            "kl": kl / count,
            "tokens_per_cycle": 1 + right / count,
            "agreement": [round(share / count, 3) for share in agreed],
        }


def train_medusa(
    model: TwoViewModel,
    config: MedusaConfig,
    sources: Sequence[tuple[int, TokenStream]],
    settings: MedusaSettings,
    folder: Path,
    processes: Processes,
    *,
    steps_per_epoch: float = 0.0,
    origin: dict[str, Any] | None = None,
) -> dict[str, nn.Parameter]:
    """Train heads for `model`, which stays as it is. Returns their parameters by name.

    sources: streams, each with its number of rows in a step; `settings.rows` in all. origin: plain values that identify the base
    model and the texts. If there is `folder`/medusa.pt, training resumes from it. Metrics go to `folder`/medusa.jsonl.
    """
    heads = initial_heads(model, config)
    if settings.compile:
        model.compile_layers()
    loss = MedusaLoss(model, heads, settings)
    tokens, device = mixed_rows(sources, settings.row_length, settings.seed), model.head_weight.device

    def backward(step: int, rows: range) -> None:
        (loss(to_device(tokens(step, rows), device)) * (len(rows) / settings.rows)).backward()

    optimise(
        heads,
        settings,
        processes,
        folder / "medusa.pt",
        origin=origin or {},
        steps_per_epoch=steps_per_epoch,
        backward=backward,
        report=lambda: loss.report(processes),
    )
    return heads
