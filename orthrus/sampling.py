"""Coupled sampling: the pick at a position is argmax(filtered logits / T + g(seed, position)), or plain argmax if greedy.

Rows are grouped by their filter settings, never padded to each other's: a row's arithmetic must not depend on its neighbours.
Order of operations: token mask and forbidden ends, repetition, presence and frequency penalties, logit bias, temperature,
top-k, top-p, min-p.
"""

from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import gumbel_noise
from orthrus.request import SamplingParams, TokenLogprob
from orthrus.token_mask import TokenMask


@dataclass(frozen=True)
class PickRows:
    """Consecutive logit rows of one sequence: the first predicts `position`, the next `position` + 1, ...

    prompt, generated: the committed tokens, needed for penalties only. ahead: tokens assumed at `position` and after it;
    row i predicts on top of the first i of them (a draft's own penalties leave them out: that costs acceptance only).
    mask: what is allowed at `position`. drafting: each row predicts on top of the picks of those before it. ends: tokens
    that are not allowed at positions below `may_end`.
    """

    params: SamplingParams
    seed: int
    position: int
    count: int
    prompt: Seq[int] = ()
    generated: Seq[int] = ()
    ahead: Seq[int] = ()
    mask: TokenMask | None = None
    drafting: bool = False
    ends: Seq[int] = ()
    may_end: int = 0

    @property
    def endless_rows(self) -> int:
        """Rows that may not pick one of `ends`."""
        return min(self.count, max(0, self.may_end - self.position)) if self.ends else 0

    @property
    def adjusted(self) -> bool:
        """Whether anything but temperature and filters changes the logits; a draft's mask comes after its picks."""
        masked = self.mask is not None and not self.drafting
        return masked or self.endless_rows > 0 or self.params.has_penalties or bool(self.params.logit_bias)


def _penalise(logits: Tensor, rows: PickRows) -> None:
    """Apply penalties and logit bias to logits [rows, vocab] in place. Repetition: Keskar et al., 2019; others: OpenAI."""
    params, vocab = rows.params, logits.shape[1]
    if params.has_penalties:
        device = logits.device
        counts = torch.bincount(
            torch.tensor(rows.generated, dtype=torch.int64, device=device), minlength=vocab
        )
        counts = counts.repeat(rows.count, 1)
        for i, token in enumerate(rows.ahead[: rows.count - 1]):
            counts[i + 1 :, token] += 1
        seen = counts > 0
        seen[:, torch.tensor(rows.prompt, dtype=torch.int64, device=device)] = True
        penalty = params.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits.copy_(torch.where(seen, penalised, logits))
        logits.sub_(counts * params.frequency_penalty).sub_((counts > 0) * params.presence_penalty)
    if params.logit_bias:
        tokens = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[:, tokens] += torch.tensor(
            list(params.logit_bias.values()), device=logits.device, dtype=logits.dtype
        )


def _filter(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """-inf where the filters drop a token; scores [rows, vocab] are logits / T. Ties with the last kept token are kept."""
    if 0 < top_k < scores.shape[1] or top_p < 1.0:
        k = min(top_k, scores.shape[1]) if top_k else scores.shape[1]
        ranked = scores.topk(k, dim=-1).values
        threshold = ranked[:, -1:]
        if top_p < 1.0:
            before = ranked.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0.0
            # At least the best, also for a top_p that float32 takes for 0.
            kept = (before < top_p).sum(-1, keepdim=True).clamp_(min=1)
            threshold = ranked.gather(1, kept - 1)
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    if min_p > 0.0:
        probabilities = scores.softmax(-1)
        floor = probabilities.amax(-1, keepdim=True) * min_p
        scores = scores.masked_fill(probabilities < floor, float("-inf"))
    return scores


def pick(logits: Tensor, groups: Seq[PickRows]) -> list[list[int]]:
    """The token at every row of logits [rows, vocab], whose rows are those of `groups` in order. One list per group."""
    scores = logits.clone() if any(g.adjusted for g in groups) else logits
    spans: list[slice] = []
    for group in groups:
        start = spans[-1].stop if spans else 0
        spans.append(slice(start, start + group.count))
        if group.mask is not None and not group.drafting:
            _forbid(scores[spans[-1]], group.mask.allowed(group.ahead[: group.count - 1]))
        if endless := group.endless_rows:
            scores[start : start + endless, torch.tensor(group.ends, device=logits.device)] = float("-inf")
        if group.adjusted:
            _penalise(scores[spans[-1]], group)
    picks = scores.argmax(-1)

    sampled: dict[tuple[float, int, float, float], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        params = group.params
        if not params.greedy:
            sampled[params.temperature, params.top_k, params.top_p, params.min_p].append(index)
    for (temperature, top_k, top_p, min_p), members in sampled.items():
        rows = torch.tensor(
            [r for i in members for r in range(spans[i].start, spans[i].stop)], device=logits.device
        )
        seeds = [groups[i].seed for i in members for _ in range(groups[i].count)]
        positions = [groups[i].position + offset for i in members for offset in range(groups[i].count)]
        filtered = _filter(scores[rows] / temperature, top_k, top_p, min_p)
        noise = gumbel_noise(seeds, positions, logits.shape[1], logits.device)
        picks[rows] = (filtered + noise).argmax(-1)
    flat = picks.tolist()
    return [
        _follow_mask(logits[span], group, flat[span])
        if group.mask is not None and group.drafting
        else flat[span]
        for group, span in zip(groups, spans, strict=True)
    ]


def _forbid(logits: Tensor, bits: Tensor) -> None:
    """-inf in place where a token's bit is not set; logits [rows, vocab], bits as `TokenMask.allowed` gives them."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits.to(logits.device).unsqueeze(-1) >> shifts & 1).bool().flatten(1)
    logits.masked_fill_(~allowed[:, : logits.shape[1]], float("-inf"))


def _follow_mask(logits: Tensor, rows: PickRows, picks: list[int]) -> list[int]:
    """A draft's picks with those replaced that the mask forbids, each given the ones before it.

    Where the filters ran before the mask, verification may still pick otherwise: that costs acceptance only.
    """
    assert rows.mask is not None
    while (good := rows.mask.accepts(picks)) < len(picks):
        row = logits[good : good + 1].clone()
        _forbid(row, rows.mask.allowed(picks[:good], good))
        [[picks[good]]] = pick(row, [replace(rows, position=rows.position + good, count=1, mask=None)])
        if rows.mask.accepts(picks[: good + 1]) == good:
            break  # The text has ended before this position.
    return picks


def token_logprobs(logits: Tensor, tokens: Seq[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of `tokens` under the raw logits [len(tokens), vocab], with the `top` best alternatives each."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(top, dim=-1)
    return tuple(
        TokenLogprob(token, logprob, tuple(zip(best_ids, best_values, strict=True)))
        for token, logprob, best_ids, best_values in zip(
            tokens, chosen, ids.tolist(), values.tolist(), strict=True
        )
    )
