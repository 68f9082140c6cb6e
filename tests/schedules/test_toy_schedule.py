"""A new schedule is one class and one line in the registry: a toy, which verifies drafts that are always the same."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from orthrus.cli import build_parser
from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.measure.verify import VerifyOptions, verify
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import ar_rows
from orthrus.schedules.protocol import Commit, ScheduleContext, Turn
from orthrus.schedules.registry import SCHEDULES, ScheduleEntry
from tests.checkpoints import make_checkpoint

DRAFT = [5, 5, 5]


class ConstantDraft:
    """Each pass verifies the same three drafts after the newest token."""

    max_groups = 1
    max_rows = max_logits = 1 + len(DRAFT)

    @classmethod
    def build(cls, context: ScheduleContext) -> "ConstantDraft":
        return cls()

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        room = sequence.max_length - sequence.newest_position - 1
        tokens = [sequence.newest_token, *DRAFT[: room - 1]]
        groups = ar_rows(tokens, sequence.newest_position, sequence.block_table)
        return Turn("constant", groups, (False,), num_verified=len(tokens) - 1, can_advance=False)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        drafts = turn.groups[0].tokens[1:]
        wrong = [draft != pick for draft, pick in zip(drafts, picks[0], strict=False)]
        accepted = [*wrong, True].index(True)
        return Commit(picks[0][: accepted + 1], accepted)

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        raise AssertionError("its turns can't advance")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "constant", ScheduleEntry(f"{__name__}:ConstantDraft"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("toy") / "model", diffusion=False)


def engine(path: Path, schedule: str) -> Engine:
    return Engine.from_pretrained(EngineConfig(model=str(path), schedule=schedule, kv_cache_tokens=2048))


def test_its_text_is_that_of_ar_and_right_drafts_save_passes(checkpoint: Path) -> None:
    # A bias makes the model pick the drafted token often, but not always.
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=60, ignore_eos=True, logit_bias={5: 6.0})
        for seed in range(4)
    ]
    prompts = [[seed, 5] for seed in range(4)]
    toy, ar = engine(checkpoint, "constant"), engine(checkpoint, "ar")
    passes: list[PassRecord] = []
    toy.observer = passes.append
    expected = ar.generate(prompts, params)
    got = toy.generate(prompts, params)
    assert [c.token_ids for [c] in got] == [c.token_ids for [c] in expected]
    assert ar.stats.tokens_per_cycle == 1.0
    assert toy.stats.tokens_per_cycle > 1.8
    turns = [turn for record in passes for turn in record.turns if turn.turn.kind == "constant"]
    assert len(turns) == toy.stats.cycles
    # Each turn commits the drafts that were right and one token more.
    assert sum(turn.num_accepted + 1 for turn in turns) == toy.stats.committed
    assert {turn.turn.num_verified for turn in turns} >= {3}


def test_verify_and_the_command_line_know_it(checkpoint: Path) -> None:
    options = VerifyOptions(str(checkpoint), tokens=600, max_tokens=24, device="cpu", compare_hf=False)
    report = verify(options)
    assert report.ok
    checks = {check.name: check for check in report.checks}
    assert {"constant alone", "constant mixed", "constant ahead"} < checks.keys()
    assert build_parser().parse_args(["generate", "--schedule", "constant"]).schedule == "constant"


class OtherRows(ConstantDraft):
    """Verifies nothing: the same row is computed three times, once without logits, and the last one's pick is committed."""

    max_groups, max_logits = 3, 2
    max_rows = 1

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        n, table = sequence.newest_position, sequence.block_table
        silent, wrong = (RowGroup(View.DIFFUSION, [5], n, table, 0, num_logits) for num_logits in (0, 1))
        right = ar_rows([sequence.newest_token], n, table)
        return Turn("other", (silent, wrong, *right), (True, True, False), can_advance=False)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        assert [len(picked) for picked in picks] == [0, 1, 1], "a list for each group"
        return Commit(picks[2], rows=[1])


def test_logprobs_are_those_of_the_rows_that_the_tokens_were_picked_at(
    tiny_orthrus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "other", ScheduleEntry(f"{__name__}:OtherRows", needs_diffusion=True))
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, ignore_eos=True, logprobs=2)
    ar = engine(tiny_orthrus, "ar")
    [[expected]] = ar.generate([[1, 2, 3]], params)
    other = engine(tiny_orthrus, "other")
    [[got]] = other.generate([[1, 2, 3]], params)
    assert other.stats.tokens_per_cycle == 1.0
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    with pytest.raises(ValueError, match="up to 3 groups, and the engine has room for 1"):
        ar.use_schedule(OtherRows())
