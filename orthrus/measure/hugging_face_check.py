"""Our forward pass against Hugging Face's own, over the text of many requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthrus.engine import Engine
from orthrus.measure.drift import Result
from orthrus.models.checkpoint import load_weights
from orthrus.models.dense import dequantised
from orthrus.models.families import family_of
from orthrus.models.family import HuggingFaceClasses
from orthrus.requests.request import Request

KL_LIMIT = 1e-10
"""In nats, in float32. Two forward passes that round differently stay below this: with orthrus-tiny, 6e-11 is the worst."""
LOGPROB_LIMIT = 1e-3
"""In nats, between the logprob of decoding and Hugging Face's. Rounding gives 1e-5, and a wrong row is off by whole nats."""


@dataclass(frozen=True)
class HuggingFaceCheck:
    """Our forward pass against transformers' own, both in `dtype`, over every generated position. All figures are in nats.

    max_logprob_gap: the largest difference from the logprobs that decoding reported. greedy_disagreements: how many greedy picks
    are not the argmax of Hugging Face's logits. max_regret: how far below the argmax the worst of these is.
    """

    dtype: str
    positions: int
    max_kl: float
    mean_kl: float
    max_logprob_gap: float
    greedy_disagreements: int
    max_regret: float
    seconds: float

    @property
    def limited(self) -> bool:
        """Whether the limits apply. They don't in 16 bits, where both forward passes round: figures are then only reported."""
        return self.dtype not in ("float16", "bfloat16")

    @property
    def ok(self) -> bool:
        if not self.limited:
            return True
        return self.max_kl <= KL_LIMIT and max(self.max_logprob_gap, self.max_regret) <= LOGPROB_LIMIT


def compare_hugging_face(
    engine: Engine, path: Path, requests: Sequence[Request], reference: dict[str, Result]
) -> HuggingFaceCheck:
    """Score every reference text with both forwards, in the engine's dtype; KL in float64 from their logits."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # It would list every diffusion weight as unused: the AR view has no use for them.
    logging.disable_progress_bar()
    started = time.perf_counter()
    classes = family_of(engine.model_config).hugging_face()
    theirs = _load(classes, engine, path).to(engine.device).eval()
    max_kl = total_kl = max_gap = max_regret = 0.0
    positions = disagreements = 0
    for request in requests:
        result = reference[request.request_id]
        ids = [*request.prompt, *result.token_ids]
        rows = slice(len(request.prompt) - 1, len(ids) - 1)  # The row at position i predicts token i + 1.
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids], device=engine.device)).logits[0, rows].double()
        ours = engine.score(ids)[rows].double().to(logits.device)
        picks = torch.tensor(result.token_ids, device=logits.device)[:, None]
        kl = kl_divergence(logits, ours)
        max_kl, total_kl = max(max_kl, float(kl.max())), total_kl + float(kl.sum())
        reported = torch.tensor([entry.logprob for entry in result.logprobs], dtype=torch.float64)
        scored = logits.log_softmax(-1).gather(1, picks)[:, 0].cpu()
        max_gap = max(max_gap, float((reported - scored).abs().max()))
        positions += len(picks)
        if request.params.greedy:
            regret = logits.max(-1).values - logits.gather(1, picks)[:, 0]
            disagreements += int((regret > 0).sum())
            max_regret = max(max_regret, float(regret.max()))
    return HuggingFaceCheck(
        dtype=str(engine.forward.dtype).removeprefix("torch."),
        positions=positions,
        max_kl=max_kl,
        mean_kl=total_kl / max(1, positions),
        max_logprob_gap=max_gap,
        greedy_disagreements=disagreements,
        max_regret=max_regret,
        seconds=time.perf_counter() - started,
    )


def _load(classes: HuggingFaceClasses, engine: Engine, path: Path) -> Any:
    """The model in transformers' own class. Quantised weights are dequantised: transformers runs them on some machines only."""
    dtype, model = engine.forward.dtype, engine.model_config
    if model.quantization is None:
        return classes.model.from_pretrained(path, dtype=dtype)
    config = classes.config.from_pretrained(path)
    del config.quantization_config
    theirs = classes.model(config).to(dtype)
    theirs.load_state_dict(dequantised(load_weights(path, model, "cpu", dtype), dtype), strict=False)
    return theirs


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) in nats per row of two float64 [rows, vocab] logits, as a sum of terms that are all >= 0.

    The textbook sum of p (log p - log q) cancels: its rounding error, 1e-16 times the vocabulary, can be negative.
    """
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    gap = q - p
    return (p.exp() * (gap.expm1() - gap)).sum(-1)
