"""Coupled sampling: the pick at a position is argmax(filtered logits / T + g(seed, position)), or plain argmax if greedy.

g is Gumbel noise that depends on nothing but seed and position, so a draft and its verification use the same noise. Logits are
adjusted in this order: token mask and tokens that would end the text too early; repetition, presence and frequency penalties;
logit bias; temperature; top-k, top-p, min-p. Only rows with the same filters are filtered in one call: a row's arithmetic must
not depend on its neighbours.
"""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from orthrus.kernels.device import to_device
from orthrus.kernels.rows.sampling import argmax, best_tokens, gumbel_argmax, noise_keys
from orthrus.kernels.rows.softmax import softmax
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.requests.request import SamplingParams
from orthrus.runner.pass_memory import ADJUSTED_ROWS
from orthrus.text.token_mask import TokenMask

_WHOLE = 1 << 40


# Not frozen: a pass makes one for every sequence, and making frozen ones takes four times as long.
@dataclass(slots=True)
class PickRows:
    """How to pick from consecutive rows of one sequence: the first predicts `position`, the next `position` + 1, ..."""

    params: SamplingParams
    seed: int
    """Seed of the sampling noise."""
    position: int
    """The position that the first row predicts."""
    count: int
    """Number of rows."""
    prompt: Seq[int] = ()
    """The prompt's tokens; needed for penalties only."""
    generated: Seq[int] = ()
    """The tokens committed after it; needed for penalties only."""
    draft_tokens: Seq[int] = ()
    """Drafted tokens from `position` on that these rows verify: row i predicts what follows the first i of them.

    Rows that draft have none, so their penalties do not count what is being drafted. That costs acceptance only.
    """
    mask: TokenMask | None = None
    """Which tokens are allowed at `position` and after it."""
    drafting: bool = False
    """Whether these rows draft: then each predicts what follows the picks of the rows before it."""
    ranks: int = 1
    """How many tokens are picked at each row, the best first. More than one for drafts only."""
    heads: int = 0
    """How many Medusa heads draft behind these rows, as in `RowGroup`."""
    end_token_ids: Seq[int] = ()
    """Tokens that are not allowed while the text is shorter than `min_length`."""
    min_length: int = 0
    """Tokens of prompt and completion before which the text must not end: the first position at which `end_token_ids` are
    allowed."""

    @property
    def num_rows_without_end(self) -> int:
        """How many rows must not pick one of `end_token_ids`. They come first."""
        return min(self.count, max(0, self.min_length - self.position)) if self.end_token_ids else 0

    @property
    def has_penalties_or_bias(self) -> bool:
        """Whether penalties or biases change the logits."""
        return self.params.has_penalties or bool(self.params.logit_bias)

    @property
    def filters(self) -> tuple[bool, float, int, float, float]:
        """Whether any of top_k, top_p and min_p filters tokens; then temperature, top_k, top_p and min_p, which say how."""
        p = self.params
        return p.has_filters, p.temperature, p.top_k, p.top_p, p.min_p

    @property
    def unadjusted(self) -> bool:
        """Whether `adjust` leaves the logits as they are. A draft's mask is applied after its picks: see `follow_masks`."""
        masked = self.mask is not None and not self.drafting
        return not (
            masked or self.has_penalties_or_bias or self.params.has_filters or self.num_rows_without_end
        )

    @property
    def reads_logits(self) -> bool:
        """Whether anything besides the pick from unadjusted logits reads the logits, so that they must be written."""
        return not self.unadjusted or self.mask is not None or self.params.logprobs is not None


def runs(groups: Seq[PickRows]) -> Iterator[tuple[slice, list[PickRows]]]:
    """Split `groups` into runs of neighbours that all need adjusting or all do not. Yields each run's slice of the rows, and it.

    A run that needs adjusting has at most `ADJUSTED_ROWS` rows, or one group, because adjusting copies its logits several times.
    """
    begin = 0
    run: list[PickRows] = []
    count = 0
    for group in groups:
        full = not group.unadjusted and count + group.count > ADJUSTED_ROWS
        if run and (full or group.unadjusted != run[0].unadjusted):
            yield slice(begin, begin + count), run
            begin, run, count = begin + count, [], 0
        run.append(group)
        count += group.count
    if run:
        yield slice(begin, begin + count), run


def _ids(tokens: Seq[int], device: torch.device) -> Tensor:
    """Token ids as int64. Those in an array are not read one by one: long lists would hold up the pass."""
    return torch.from_numpy(np.asarray(tokens, np.int64)).to(device)


def _penalise(logits: Tensor, rows: PickRows) -> None:
    """Apply penalties and logit bias to logits [rows, vocab] in place. Repetition: Keskar et al., 2019; others: OpenAI."""
    params, vocab = rows.params, logits.shape[1]
    if params.has_penalties:
        device = logits.device
        counts = torch.bincount(_ids(rows.generated, device), minlength=vocab)
        counts = counts.repeat(rows.count, 1)
        for i, token in enumerate(rows.draft_tokens[: rows.count - 1]):
            counts[i + 1 :, token] += 1
        seen = counts > 0
        seen[:, _ids(rows.prompt, device)] = True
        penalty = params.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits.copy_(torch.where(seen, penalised, logits))
        logits.sub_(counts * params.frequency_penalty).sub_((counts > 0) * params.presence_penalty)
    if params.logit_bias:
        tokens, biases = (torch.from_numpy(values).to(logits.device) for values in params.biased)
        logits[:, tokens] += biases.to(logits.dtype)


def _filter(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits [rows, vocab] with -inf for each token that the filters drop.

    As in Hugging Face's processors, top-k keeps every token that is at least as likely as the k-th, and top-p keeps the fewest
    tokens whose probabilities add up to `top_p`. Where top-p can keep only some of equally likely tokens, it keeps those with
    the lowest ids. Hugging Face does not define which.
    """
    top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    scores = logits / params.temperature
    if 0 < top_k < scores.shape[1] or top_p < 1.0:
        k = min(top_k or scores.shape[1], scores.shape[1])
        if top_p < 1.0:
            _cut_top_p(scores, k, top_p)
        else:
            scores.masked_fill_(scores < scores.topk(k, dim=-1).values[:, -1:], float("-inf"))
    if min_p > 0.0:
        probabilities = softmax(scores)
        floor = probabilities.amax(-1, keepdim=True) * min_p
        scores.masked_fill_(probabilities < floor, float("-inf"))
    return logits.masked_fill(scores == float("-inf"), float("-inf"))


def _cut_top_p(scores: Tensor, k: int, top_p: float) -> None:
    """Top-p on scores [rows, vocab] in place. It keeps tokens only among those that score no less than the k-th best."""
    ranked = scores.topk(min(k + 1, scores.shape[1]), dim=-1).values
    ranked, next_best = ranked[:, :k], ranked[:, k:]
    last = ranked[:, -1:]
    # In integers: their sums do not depend on the order. The order of a floating-point scan may depend on the number of rows.
    mass = ((ranked - ranked[:, :1]).exp().double() * _WHOLE).long()
    before = mass.cumsum(-1) - mass
    listed = before[:, -1:] + mass[:, -1:]
    further = torch.zeros_like(listed)
    # How many tokens score as much as the k-th best but are not ranked. On a GPU, counting them costs less than waiting for
    # the host to know whether there are any.
    if next_best.numel() and (scores.is_cuda or bool((next_best == last).any())):
        further = ((scores == last).count_nonzero(-1) - (ranked == last).count_nonzero(-1)).unsqueeze(-1)
    share = top_p * (listed + further * mass[:, -1:]).double()
    # At least the best token, even if top_p is 0.
    kept = (before < share).sum(-1, keepdim=True).clamp_(min=1)
    threshold = ranked.gather(1, kept - 1)
    scores.masked_fill_(scores < threshold, float("-inf"))
    # Several tokens may score exactly `threshold`. `wanted` is how many of them are kept, `equal` how many there are. If all k
    # ranked tokens are kept, tokens that are not ranked may be kept too: they score as much as the k-th.
    more = ((share - listed) / mass[:, -1:].clamp(min=1)).ceil_().long().clamp_(min=0)
    wanted = kept - (ranked > threshold).sum(-1, keepdim=True) + more.where(kept == k, 0)
    equal = (ranked == threshold).sum(-1, keepdim=True) + further.where(threshold == last, 0)
    if scores.is_cuda:
        ties = scores == threshold
        scores.masked_fill_(ties & (ties.cumsum(-1, dtype=torch.int32) > wanted), float("-inf"))
        return
    for row in (wanted < equal).flatten().nonzero().flatten().tolist():
        ties = (scores[row] == threshold[row]).nonzero().flatten()
        scores[row, ties[int(wanted[row]) :]] = float("-inf")


def adjust(logits: Tensor, groups: Seq[PickRows]) -> Tensor:
    """logits [rows, vocab] with all adjustments that `groups` ask for, except for temperature and the masks of drafts.

    A token that may not be picked has -inf. Returns `logits` itself if nothing changes. Does not wait for the device.
    """
    if all(group.unadjusted for group in groups):
        return logits
    adjusted = logits.clone()
    for group, span in zip(groups, _spans(groups), strict=True):
        if group.mask is not None and not group.drafting:
            _forbid(adjusted[span], group.mask.allowed(group.draft_tokens[: group.count - 1]))
        if num_rows := group.num_rows_without_end:
            end_token_ids = _ids(group.end_token_ids, logits.device)
            adjusted[span.start : span.start + num_rows, end_token_ids] = float("-inf")
        if group.has_penalties_or_bias:
            _penalise(adjusted[span], group)
    # Neighbouring groups with the same filters are filtered in one call.
    start = 0
    for (filtered, *_), members in itertools.groupby(groups, key=lambda group: group.filters):
        alike = list(members)
        span = slice(start, start + sum(group.count for group in alike))
        if filtered:
            adjusted[span] = _filter(adjusted[span], alike[0].params)
        start = span.stop
    return adjusted


def pick(logits: Tensor, groups: Seq[PickRows]) -> list[int]:
    """The token picked at every row of logits [rows, vocab], which are the rows of `groups` in order, and then the further
    ranks of the groups that ask for them, as `further_ranks` orders them.

    `NO_TOKEN` where a logit that may be picked is NaN or infinite. The masks of drafts are not applied here: see `follow_masks`.
    """
    tokens: list[int] = []
    further: list[int] = []
    for place, run in runs(groups):
        adjusted = adjust(logits[place], run)
        tokens += pick_adjusted(adjusted, run, row_keys(run)).tolist()
        for group, span in zip(run, _spans(run), strict=True):
            if group.ranks > 1:
                further += further_ranks(adjusted[span], group).tolist()
    return tokens + further


def pick_adjusted(adjusted: Tensor, groups: Seq[PickRows], keys: np.ndarray | Tensor) -> Tensor:
    """The token picked at every row of adjusted logits [rows, vocab]: int [rows]; see `pick`. keys: the rows' noise keys.

    Does not wait for the device.
    """
    if all(group.params.greedy for group in groups):
        return argmax(adjusted)
    device = adjusted.device
    picks = torch.empty(adjusted.shape[0], dtype=torch.int32, device=device)
    temperatures = to_device(torch.from_numpy(row_temperatures(groups)), device)
    if not isinstance(keys, Tensor):
        keys = to_device(torch.from_numpy(keys), device)
    gumbel_argmax(adjusted, temperatures, keys, picks, torch.zeros(1, dtype=torch.int32, device=device))
    return picks


def further_ranks(logits: Tensor, rows: PickRows) -> Tensor:
    """The tokens of ranks 1 to `rows.ranks` - 1 for logits [rows, vocab], where the best token has rank 0.

    int32 [(ranks - 1) * rows], by rank and then by row; `NO_TOKEN` where there is none.
    """
    temperatures, keys = (
        torch.from_numpy(values([rows])).to(logits.device) for values in (row_temperatures, row_keys)
    )
    return best_tokens(logits, temperatures, keys, rows.ranks)[:, 1:].t().flatten()


def row_temperatures(groups: Seq[PickRows]) -> np.ndarray:
    """The temperature of every row of `groups`: float32 [rows]."""
    counts = [group.count for group in groups]
    return np.repeat(np.array([group.params.temperature for group in groups], np.float32), counts)


def row_keys(groups: Seq[PickRows]) -> np.ndarray:
    """The noise keys of every row of `groups`: int32 [rows, 2]."""
    return keys_from(
        [group.seed for group in groups],
        [group.position for group in groups],
        [group.count for group in groups],
    )


def keys_from(seeds: Seq[int], positions: Seq[int], counts: Seq[int]) -> np.ndarray:
    """The noise keys of `counts` positions each, from `positions` on, with these seeds: int32 [sum of counts, 2]."""
    lengths = np.array(counts)
    first = np.repeat(np.array(positions), lengths)
    offset = np.arange(len(first)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return noise_keys(np.repeat(np.array(seeds, np.uint64), lengths), first + offset)


def follow_masks(logits: Tensor, groups: Seq[PickRows], picks: list[int]) -> list[list[int]]:
    """`picks`, in the order of `LaunchedPass.picks`, as one list for each group: a token for each row, then those of the further
    ranks, then those of Medusa heads.

    In drafts, tokens that the mask forbids are replaced, and further ranks are left out. logits [rows, vocab] of the same rows
    are read for such drafts only.
    """
    spans = _spans(groups)
    lists, further = [], spans[-1].stop if spans else 0
    of_heads = iter(picks[len(picks) - sum([group.heads for group in groups]) :])
    for group, span in zip(groups, spans, strict=True):
        own = picks[span]
        behind = further + (group.ranks - 1) * group.count
        if group.mask is not None and group.drafting:
            own = _follow_mask(logits[span], group, own)
        elif group.ranks > 1 or group.heads:
            own += picks[further:behind] + list(islice(of_heads, group.heads))
        lists.append(own)
        further = behind
    return lists


def _spans(groups: Seq[PickRows]) -> list[slice]:
    ends = itertools.accumulate(group.count for group in groups)
    return [slice(end - group.count, end) for group, end in zip(groups, ends, strict=True)]


def _forbid(logits: Tensor, bits: Tensor) -> None:
    """-inf in place where a token's bit is not set; logits [rows, vocab], bits as `TokenMask.allowed` gives them."""
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits.to(logits.device).unsqueeze(-1) >> shifts & 1).bool().flatten(1)
    logits.masked_fill_(~allowed[:, : logits.shape[1]], float("-inf"))


def _follow_mask(logits: Tensor, rows: PickRows, picks: list[int]) -> list[int]:
    """A draft's picks, with each token that the mask forbids at its place replaced by a pick from the allowed ones.

    The picks that are not replaced were filtered without the mask, so verification may still pick another token. That costs
    acceptance only.
    """
    assert rows.mask is not None
    picks = list(itertools.takewhile(lambda token: token != NO_TOKEN, picks))
    while (good := rows.mask.accepts(picks)) < len(picks):
        row = logits[good : good + 1].clone()
        _forbid(row, rows.mask.allowed(picks[:good], good))
        [picks[good]] = pick(row, [replace(rows, position=rows.position + good, count=1, mask=None)])
        if picks[good] == NO_TOKEN:
            return picks[:good]
        if rows.mask.accepts(picks[: good + 1]) == good:
            break  # The text has ended before this position.
    return picks
