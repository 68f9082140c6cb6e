"""How to pick for a sequence, and the chunks that are made of the picks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.engine.logprobs import SCORED, prompt_logprobs, token_logprobs
from orthrus.engine.planned_turn import PlannedTurn
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.plan import RowGroup
from orthrus.requests.request import Chunk, CycleReport, PromptLogprobs
from orthrus.requests.sequence import SequenceState
from orthrus.runner.sampler import PickRows
from orthrus.schedules.protocol import Commit, Turn

NO_NUMBERS = (
    "the model's scores for the next token are NaN or infinite: its weights are damaged, or its dtype is too small for them "
    "(load it in bfloat16 or float32)"
)


def pick_rows(part: PlannedTurn) -> list[PickRows]:
    """How to pick from the part's rows with logits, by group: first those that score the prompt, then the others."""
    sequence, params, scoring = part.sequence, part.sequence.params, part.num_scoring
    penalised = params.has_penalties
    generated = sequence.tokens[sequence.num_prompt :] if penalised else []
    rows: list[PickRows] = []
    for group, drafting in zip(part.turn.groups, part.turn.drafting, strict=True):
        first = group.logits_from
        if scoring:
            rows.append(PickRows(SCORED, seed=0, position=group.start + first + 1, count=scoring))
            first += scoring
        count = group.logits_to - first
        if not count:
            continue
        rows.append(
            # By place, since there are hundreds in a pass.
            PickRows(
                params,
                sequence.seed,
                group.start + first + 1,  # position
                count,
                sequence.prompt_ids if penalised else (),
                generated + _path(group) if penalised else (),
                () if drafting else group.tokens[first + 1 :],  # draft_tokens
                sequence.mask,
                drafting,
                part.turn.ranks if drafting else 1,
                group.heads,
                sequence.withheld_stop_ids,
                sequence.num_prompt + params.min_tokens,
            )
        )
    return rows


def _path(group: RowGroup) -> list[int]:
    """The drafts on the path to the group's first row, that row's token included. Empty if that token is committed."""
    path: list[int] = []
    start, parent = group.start + 1, group.parent
    if parent is not None:
        path = [group.tokens[0]]
    while parent is not None:
        # A group without a parent begins with the newest token, which is committed.
        first = int(parent.parent is None)
        path[:0] = parent.tokens[first : start - 1 - parent.start]
        start, parent = parent.start + 1, parent.parent
    return path


def score_prompt(part: PlannedTurn, logits: Tensor) -> None:
    """Keep the log-probabilities of the prompt tokens after the part's scoring rows.

    logits [num_scoring, vocab_size]: those of the scoring rows.
    """
    sequence, top = part.sequence, part.sequence.params.prompt_logprobs
    assert top is not None, "only then are there scoring rows"
    rows = sequence.unscored[: part.num_scoring]
    sequence.unscored = sequence.unscored[part.num_scoring :]
    tokens = sequence.tokens[rows.start + 1 : rows.stop + 1]
    sequence.prompt_scores.append(prompt_logprobs(logits, tokens, top))


def append_tokens(sequence: SequenceState, tokens: Sequence[int]) -> str | None:
    """Append tokens until one ends the sequence. Returns an error message if a pick was NO_TOKEN, and else None."""
    for token in tokens:
        if token == NO_TOKEN:
            sequence.finish_reason = "error"
            return NO_NUMBERS
        sequence.append(token)
        if sequence.finish_reason is not None:
            break
    return None


def tokens_chunk(
    sequence: SequenceState,
    turn: Turn,
    commit: Commit,
    tokens: list[int],
    logits: Tensor,
    first_row: int,
    first: bool,
    error: str | None,
) -> Chunk:
    """The chunk of a turn. logits [rows, vocab_size]: of all rows of the pass that have them. first_row: the first that picks for
    the turn.

    tokens: those of `commit` that were appended. first: whether it is the sequence's first chunk.
    """
    top, logprobs = sequence.params.logprobs, None
    if top is not None:
        own = logits[first_row:] if commit.rows is None else logits[[first_row + row for row in commit.rows]]
        logprobs = token_logprobs(own[: len(tokens)], tokens, top)
    chunk = Chunk(
        sequence.request_id,
        sequence.index,
        tuple(tokens),
        logprobs,
        sequence.finish_reason,
        sequence.stop_reason,
        None if sequence.finish_reason is None else sequence.stats(),
        error,
    )
    if first:
        chunk.prompt_logprobs = _take_prompt_scores(sequence, logits.shape[-1])
    elif sequence.params.return_drafts:
        chunk.cycles = _cycles(sequence, turn, commit, len(tokens))
    return chunk


def _cycles(sequence: SequenceState, turn: Turn, commit: Commit, num_tokens: int) -> tuple[CycleReport, ...]:
    """The report of the cycle, if `turn` or the text's end ends it. num_tokens: how many tokens of `commit` were appended."""
    sequence.cycle_tokens += num_tokens
    if not turn.ends_cycle and sequence.finish_reason is None:
        return ()
    report = CycleReport(sequence.cycle_tokens, tuple(commit.drafts), commit.num_accepted)
    sequence.cycle_tokens = 0
    return (report,)


def final_chunk(sequence: SequenceState, error: str, param: str | None = None) -> Chunk:
    """The last chunk of a sequence that cannot go on. param: the request's field that is at fault, if any."""
    return Chunk(
        sequence.request_id,
        sequence.index,
        (),
        finish_reason="error",
        stats=sequence.stats(),
        error=error,
        error_param=param,
    )


def _take_prompt_scores(sequence: SequenceState, vocab_size: int) -> PromptLogprobs | None:
    """The scores of the prompt for the first chunk of choice 0. None for other choices, or if they were not asked for.

    The sequence does not keep them.
    """
    top = sequence.params.prompt_logprobs
    if top is None or sequence.index:
        return None
    scores = sequence.prompt_scores
    sequence.prompt_scores = []
    return PromptLogprobs.joined(scores or [prompt_logprobs(torch.zeros(0, vocab_size), [], top)])
