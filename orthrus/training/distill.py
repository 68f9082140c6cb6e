"""Forward KL from the AR view's distribution to the diffusion view's, with its gradient, for one slice of rows at a time.

Logits of all rows in float32, with their softmax and gradients, would need more memory than everything else. Because the LM head
is frozen, only the gradient of the hidden states has to be kept.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _slice_kl(hidden: Tensor, target: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL [rows], its gradient by hidden [rows, hidden_size], and top-1 agreement bool [rows]."""
    logits = F.linear(hidden, head).float()
    student, teacher = F.log_softmax(logits, -1), F.log_softmax(target.float(), -1)
    probability = teacher.exp()
    kl = (probability * (teacher - student)).sum(-1)
    gradient = student.exp() - probability
    return kl, gradient.to(hidden.dtype) @ head, logits.argmax(-1) == target.argmax(-1)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        index: Tensor,
        head: Tensor,
        weigh: Callable[[Tensor, Tensor], Tensor],
        slice_rows: int,
        kernel: Callable[..., Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            kernel(h, targets[i], head)
            for h, i in zip(hidden.split(slice_rows), index.split(slice_rows), strict=True)
        ]
        kl, gradient, agree = (torch.cat(columns) for columns in zip(*parts, strict=True))
        weight = weigh(kl, agree)
        ctx.save_for_backward(gradient * weight[:, None].to(gradient.dtype))
        ctx.mark_non_differentiable(kl, agree)
        return (kl * weight).sum(), kl, agree

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None, None


# Logits that are computed at once: 256 MB in float32, and a few times as much with softmaxes and gradient.
_SLICE_LOGITS = 1 << 26

_compiled: dict[bool, Callable[..., Any]] = {}


def forward_kl(
    hidden: Tensor,
    targets: Tensor,
    index: Tensor,
    head: Tensor,
    weigh: Callable[[Tensor, Tensor], Tensor],
    *,
    slice_rows: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over rows of weight * KL(target || softmax(hidden @ head.T)), in float32 even under autocast.

    hidden [rows, hidden_size]: the diffusion view's. targets [positions, vocab_size]: AR logits of each position. index int64
    [rows]: each row's position in `targets`. head [vocab_size, hidden_size]: frozen. weigh: makes the weights, float [rows],
    from KL and agreement (see below); no gradient flows through them. slice_rows: rows at once, None for as many as fit.
    Returns the sum (differentiable by hidden), KL [rows] in nats, and top-1 agreement, bool [rows].
    """
    if compiled not in _compiled:
        _compiled[compiled] = torch.compile(_slice_kl) if compiled else _slice_kl
    if slice_rows is None:
        # Slices of equal length: the kernel is compiled for one shape.
        slices = math.ceil(len(hidden) * head.shape[0] / _SLICE_LOGITS)
        slice_rows = math.ceil(len(hidden) / slices)
    with torch.autocast(hidden.device.type, enabled=False):
        total, kl, agree = _ForwardKL.apply(
            hidden.to(head.dtype), targets, index, head, weigh, slice_rows, _compiled[compiled]
        )
    return total, kl, agree
