"""Optimisers and their schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.training.settings import TrainingSettings

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., 2024), tuned for speed rather than exactness.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def learning_rate(progress: float, *, warmup: float, final: float) -> float:
    """The factor on the peak learning rate at `progress` (0 to 1): a linear rise over `warmup`, then a cosine down to `final`."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    after = min(1.0, (progress - warmup) / (1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * after))


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest (semi-)orthogonal matrix to each of `matrices` [count, rows, columns]. In bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalises the momentum of each weight matrix (Jordan et al., 2024). Matrices of equal shape form a batch."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                momenta = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                mixed = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalise(torch.stack(mixed)).to(parameters[0].dtype)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)


def build_optimizers(
    named: dict[str, nn.Parameter], settings: TrainingSettings
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters. If the settings say so, Muon for the matrices inside the layers."""
    matrices = [
        p for n, p in named.items() if settings.optimizer == "muon" and p.dim() == 2 and ".layers." in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = any(p.is_cuda for p in rest)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=fused
        )
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
