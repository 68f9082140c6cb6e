"""Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019)."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32 or wider; shape and dtype of x.

    `weight` broadcasts against x, so that one call can norm heads that have different weights.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
