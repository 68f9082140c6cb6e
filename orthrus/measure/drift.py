"""Results of the same requests, compared bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.engine import Engine
from orthrus.requests.request import RequestStats, TokenLogprob


@dataclass(frozen=True)
class Result:
    """All of one request's output: token ids, a logprob for each if they were asked for, and what it cost."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    stats: RequestStats


@dataclass(frozen=True)
class Drift:
    """The first position at which a request differs from the reference. expected, got: token and logprob, as text."""

    check: str
    request: str
    position: int
    expected: str
    got: str


@dataclass(frozen=True)
class Check:
    """One way of running all requests. drifted_*: how many tokens differ from the reference in their id, or in logprob bits.

    tokens_per_cycle: tokens committed per draft and verify pass (AR: per pass). tokens_per_pass: TPF, draft passes counted.
    """

    name: str
    requests: int
    tokens: int
    drifted_tokens: int
    drifted_logprobs: int
    tokens_per_cycle: float
    tokens_per_pass: float
    seconds: float
    preemptions: int
    prefix_hit_tokens: int


def summarize(
    name: str, engine: Engine, results: dict[str, Result], reference: dict[str, Result], seconds: float
) -> Check:
    """Count `results` of a run that took `seconds` and compare them with `reference`, which has the same requests."""
    drifted_tokens = drifted_logprobs = 0
    for request_id, result in results.items():
        expected = reference[request_id]
        drifted_tokens += abs(len(expected.token_ids) - len(result.token_ids))
        drifted_tokens += sum(a != b for a, b in zip(expected.token_ids, result.token_ids, strict=False))
        if result.logprobs:
            drifted_logprobs += abs(len(expected.logprobs) - len(result.logprobs))
            drifted_logprobs += sum(a != b for a, b in zip(expected.logprobs, result.logprobs, strict=False))
    after_first = sum(result.stats.completion_tokens - 1 for result in results.values())
    return Check(
        name=name,
        requests=len(results),
        tokens=sum(len(result.token_ids) for result in results.values()),
        drifted_tokens=drifted_tokens,
        drifted_logprobs=drifted_logprobs,
        tokens_per_cycle=after_first / max(1, sum(result.stats.cycles for result in results.values())),
        tokens_per_pass=after_first / max(1, sum(result.stats.passes for result in results.values())),
        seconds=seconds,
        preemptions=engine.stats.preemptions,
        prefix_hit_tokens=engine.stats.prefix_hit_tokens,
    )


def find_drifts(check: str, results: dict[str, Result], reference: dict[str, Result]) -> list[Drift]:
    """The first drift of each request that has one."""
    drifts = []
    for request_id, result in results.items():
        expected = reference[request_id]
        silent = [None] * len(expected.token_ids), [None] * len(result.token_ids)
        scored = (expected.logprobs, result.logprobs) if result.logprobs else silent
        before, after = (
            [*zip(r.token_ids, values, strict=True)]
            for r, values in zip((expected, result), scored, strict=True)
        )
        if before == after:
            continue
        shared = min(len(before), len(after))
        position = next((i for i in range(shared) if before[i] != after[i]), shared)
        drifts.append(Drift(check, request_id, position, _show(before, position), _show(after, position)))
    return drifts


def _show(tokens: Sequence[tuple[int, TokenLogprob | None]], position: int) -> str:
    if position >= len(tokens):
        return "the end"
    token, logprob = tokens[position]
    return f"token {token}" if logprob is None else f"token {token} ({logprob.logprob!r})"
