"""Evaluation of a checkpoint: held-out loss of the AR view, and tokens per cycle and agreement by depth of its drafts.

Drafts are measured in the engine that serves them: it counts cycles, and its observer receives every draft and verify turn.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from tqdm import tqdm

from orthrus.engine import Engine
from orthrus.engine.observer import PassRecord, TurnRecord
from orthrus.engine.pass_limits import DECODE_ROWS
from orthrus.requests.request import Request, SamplingParams
from orthrus.schedules.blocks import LEAD_DRAFT, VERIFY
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.planner import DraftPlanner
from orthrus.training.settings import Settings


class EvalSettings(Settings):
    """What to evaluate a checkpoint on."""

    prompts: Path | None = None
    """A JSONL file (see `read_prompts`) for both the prompts and the loss. None takes both from the held-out part of the corpus;
    its prompts are continued past the end of a document."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template, for the file's prompts."""
    rows: int = 128
    """Rows of tokens that the loss is measured on."""
    row_length: int = 2048
    """Tokens of each of these rows."""
    texts: int = 64
    """Number of prompts to continue, to measure drafts."""
    prompt_length: int = 64
    """Tokens of a prompt from the corpus."""
    new_tokens: int = 256
    """Tokens to continue each prompt by."""
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    """Drafts are measured at each of these."""
    block_rows: tuple[int, ...] = (4, 8, 16, 32)
    """Block lengths to try. Those over the checkpoint's are left out."""
    leads: tuple[bool, ...] = (True, False)
    """Whether to try blocks with a lead (True), without one (False), or both."""
    profile: Path | None = None
    """Where to write how often drafts are right, by depth and rank, for `orthrus bench shape --profile`. None: nowhere."""
    shown: int = 10
    """Number of texts to keep in the report."""
    seed: int = 1
    """Seed of the first text. Each further text has the next number."""


def held_out_loss(engine: Engine, rows: Sequence[Sequence[int]]) -> float:
    """The AR view's mean loss on `rows` of token ids, in nats per token. The first token of a row is not predicted."""
    total, count = 0.0, 0
    for row in tqdm(rows, desc="held-out loss", unit="row", disable=None, leave=False):
        targets = torch.tensor(row[1:], device=engine.device)
        total += F.cross_entropy(engine.score(row)[:-1].float(), targets, reduction="sum").item()
        count += len(targets)
    return total / max(1, count)


class _Verified:
    """An engine's observer that records how many drafts of each block of `block_rows` rows were accepted."""

    def __init__(self, block_rows: int) -> None:
        self.accepted: list[int] = []
        """For each block, how many of its drafts were accepted."""
        self.first_agreed: list[bool] = []
        """For each block with a lead, whether the block's own draft of the first token equals the lead's token."""
        self._block_rows = block_rows
        # The newest draft turn with a lead, by request.
        self._leads: dict[str, TurnRecord] = {}

    def __call__(self, record: PassRecord) -> None:
        for turn in record.turns:
            if turn.turn.kind == LEAD_DRAFT:
                self._leads[turn.request_id] = turn
            # Shorter blocks, near the end of a text, are left out.
            elif turn.turn.kind == VERIFY and turn.turn.num_verified == self._block_rows - 1:
                self.accepted.append(turn.num_accepted)
                if (draft := self._leads.get(turn.request_id)) is not None:
                    lead, block = draft.picks
                    self.first_agreed.append(block[:1] == lead)


def measure_drafts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: EvalSettings,
    *,
    block_rows: int,
    lead: bool,
    temperature: float,
) -> tuple[dict[str, Any], list[list[int]]]:
    """Continue `prompts` with blocks of `block_rows` rows. Returns figures and texts. The engine has this schedule afterwards.

    Depth d is the d-th token after the newest committed one. The figures are:
    - tokens_per_cycle: tokens that one draft and one verify pass commit, on average.
    - cycles: number of cycles with a whole block. Figures by depth count only these.
    - acceptance: for d = 1, 2, ..., the share of these cycles in which the first d tokens were right.
    - agreement: for d = 1, 2, ..., the share of drafts at depth d that the AR view agreed with, among those after right tokens.
      A lead's token, at depth 1, is always right. So with a lead, agreement at depth 1 is that of the block's own first draft.
    - distinct_8grams: share of a text's 8-grams that occur in it for the first time, on average.
    """
    mask = engine.model_config.mask_token_id
    assert mask is not None, "only a checkpoint with a diffusion view can draft"
    planner = DraftPlanner(block_rows, None, DECODE_ROWS, lead)
    engine.use_schedule(OrthrusSchedule(planner, mask, engine.max_model_len))
    engine.observer = verified = _Verified(block_rows)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=temperature,
            seed=settings.seed + index,
            max_tokens=settings.new_tokens,
            ignore_eos=settings.prompts is None,
        )
        engine.submit(Request(str(index), prompt, params))
    texts: list[list[int]] = [[] for _ in prompts]
    tokens = cycles = 0
    while engine.has_work:
        for chunk in engine.step():
            texts[int(chunk.request_id)].extend(chunk.token_ids)
            if chunk.stats is not None:
                tokens += chunk.stats.completion_tokens - 1
                cycles += chunk.stats.cycles
    engine.observer = None
    num_blocks = len(verified.accepted)
    right = [lead + accepted for accepted in verified.accepted]
    reached = [sum(r >= depth for r in right) for depth in range(block_rows + lead)]
    agreed = [r / max(1, b) for b, r in pairwise(reached)]
    if lead:
        agreed[0] = sum(verified.first_agreed) / max(1, num_blocks)
    values = {
        "temperature": temperature,
        "block_rows": block_rows,
        "lead": lead,
        "cycles": num_blocks,
        "tokens_per_cycle": round(tokens / max(1, cycles), 3),
        "acceptance": [round(r / max(1, num_blocks), 3) for r in reached[1:]],
        "agreement": [round(a, 3) for a in agreed],
        "distinct_8grams": round(sum(map(distinct_ngrams, texts)) / len(texts), 3),
    }
    return values, texts


def distinct_ngrams(text: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams of `text` that occur in it for the first time."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def table(report: dict[str, Any]) -> str:
    """The figures of a report as text. Its entry `drafts` has the figures of `measure_drafts`."""
    depths = [1, 2, 4, 8, 16]
    lines = [
        f"held-out loss {report['held_out_loss']:.3f} nats per token",
        "",
        "temperature  block  lead  tokens/cycle  distinct 8-grams  agreement at depth "
        + "".join(f"{depth:>6}" for depth in depths),
    ]
    for row in report["drafts"]:
        agreement = "".join(f"{row['agreement'][d - 1]:6.2f}" for d in depths if d <= len(row["agreement"]))
        lines.append(
            f"{row['temperature']:>11g}  {row['block_rows']:>5}  {'yes' if row['lead'] else 'no':>4}  "
            f"{row['tokens_per_cycle']:>12.2f}  "
            f"{row['distinct_8grams']:>16.2f}  {'':19}{agreement}"
        )
    return "\n".join(lines)
