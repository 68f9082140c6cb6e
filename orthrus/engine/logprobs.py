"""Log-probabilities of tokens of answers and prompts, always under the model's raw logits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orthrus.kernels.rows.softmax import log_softmax
from orthrus.requests.request import PromptLogprobs, SamplingParams, TokenLogprob

SCORED = SamplingParams(temperature=0.0, logprobs=0)
"""Parameters of rows that only score the tokens of a prompt. Their logits are read, and their picks are not used."""
_ROWS_AT_ONCE = 64
"""Rows that are scored at a time. Their log-probabilities take 40 MB with a vocabulary of 150,000 tokens."""


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of `tokens` under the raw logits [len(tokens), vocab], with the `top` best alternatives each."""
    found: list[TokenLogprob] = []
    for some, part in _parts(logits, tokens):
        _, chosen, values, ids = _scores(part, some, top)
        found += [
            TokenLogprob(token, logprob, tuple(zip(best_ids, best_values, strict=True)))
            for token, logprob, best_ids, best_values in zip(
                some, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
            )
        ]
    return tuple(found)


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> PromptLogprobs:
    """The same numbers as `token_logprobs`, to the last bit, as arrays for many tokens. `tokens` may be empty."""
    parts = []
    for some, part in _parts(logits, tokens):
        logprobs, chosen, values, ids = _scores(part, some, top)
        ranks = (logprobs > chosen).sum(-1) + 1
        parts.append(
            PromptLogprobs(
                torch.tensor(some, dtype=torch.int32).numpy(),
                chosen[:, 0].cpu().numpy(),
                ranks.int().cpu().numpy(),
                ids.int().cpu().numpy(),
                values.cpu().numpy(),
            )
        )
    return PromptLogprobs.joined(parts)


def _parts(logits: Tensor, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Up to `_ROWS_AT_ONCE` tokens at a time, with their rows of logits. If there are no tokens, one empty part."""
    for start in range(0, max(1, len(tokens)), _ROWS_AT_ONCE):
        some = tokens[start : start + _ROWS_AT_ONCE]
        yield some, logits[start : start + len(some)]


def _scores(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [tokens, vocab], those of `tokens` [tokens, 1], and the `top` best with their ids [tokens, top]."""
    logprobs = log_softmax(logits)
    chosen = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits.device).unsqueeze(1))
    values, ids = logprobs.topk(top, dim=-1)
    return logprobs, chosen, values, ids
