"""N-gram drafts: the text is that of AR decoding, several tokens at a time where it repeats itself, and never more slowly."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.observer import PassRecord
from orthrus.requests.request import Completion, SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.runner.eager import EagerRunner
from orthrus.schedules import ngram_index
from orthrus.schedules.ar import STEP
from orthrus.schedules.blocks import DRAFT, VERIFY
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.ngram import NGRAM_VERIFY, NgramSchedule
from orthrus.schedules.ngram_cost import NgramCost
from orthrus.schedules.ngram_index import Match, NgramIndex
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import DraftPlanner
from orthrus.schedules.protocol import Turn
from orthrus.text.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint

TINY = Path(__file__).parents[2] / "models" / "orthrus-tiny"
ROWS = (2, 4, 8, 16, 32)
STEPS = PassCost((1, 2, 4, 8, 16), (1.0, 1.2, 1.5, 2.2, 3.6))
VERIFIED = PassCost(ROWS, (1.3, 1.4, 1.8, 2.6, 4.3))
COST = NgramCost(STEPS, VERIFIED)
"""Roughly a CPU's: every row costs something."""
GPU_COST = NgramCost(PassCost((1, 64), (1.0, 1.5)), PassCost((2, 64), (1.1, 1.6)))
"""Roughly a GPU's: rows are cheap, and the pass behind a verify pass waits for the host."""
LENGTHS = range(2, 5)


def longest_match(tokens: list[int], lengths: range) -> Match | None:
    """The longest match, by comparing all places."""
    end = len(tokens) - 1
    for length in reversed(lengths):
        for at in range(end - 1, length - 2, -1):
            if tokens[at - length + 1 : at + 1] == tokens[end - length + 1 :]:
                return Match(length, at)
    return None


@pytest.mark.parametrize("lengths", [range(1, 4), LENGTHS, range(3, 4)], ids=str)
def test_the_index_finds_the_longest_match_and_of_these_the_latest(lengths: range) -> None:
    rng = random.Random(1)
    tokens: list[int] = []
    index = NgramIndex(tokens, lengths[0], lengths[-1])
    found = 0
    for _ in range(50):
        begin = rng.randrange(len(tokens) + 1)
        # Either something new, or a piece of the text so far.
        tokens += rng.choice(([rng.randrange(30)], tokens[begin : begin + 3]))
        match = index.match()
        assert match == longest_match(tokens, lengths)
        found += match is not None
    assert found > 5


def test_a_long_prompt_is_indexed_over_several_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_index, "_MOST_AT_ONCE", 50)
    tokens = [*range(120), 5, 6, 7]
    index = NgramIndex(tokens, 2, 4)
    assert [index.match(), index.match()] == [None, None]
    assert index.match() == Match(3, 7)


def test_beyond_the_end_of_the_text_the_continuation_repeats() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2]
    index = NgramIndex(tokens, 2, 4)
    match = index.match()
    assert match == Match(2, 1)
    assert index.continuation(match, 4) == [3, 4, 9, 1]
    assert index.continuation(match, 8) == [3, 4, 9, 1, 2, 3, 4, 9]
    assert NgramIndex([7], 2, 4).match() is None


def test_a_lookup_compares_few_places_however_often_an_ngram_occurs() -> None:
    tokens = [1, 2, 3, 4] + [3, 4] * 2000
    match = NgramIndex(tokens, 2, 64).match()
    assert match is not None and match.length == 64
    longer_before = [8, 9, 1, 2] + [5, 1, 2] * 100 + [8, 9, 1, 2]
    match = NgramIndex(longer_before, 2, 4).match()
    assert match is not None and match.length == 2, "the longest match is further back than lookups go"


def test_a_sequence_that_drafts_is_charged_for_the_whole_pass() -> None:
    assert COST.ar(4, greedy=True) == 1.5
    assert COST.cycle(8, 1, greedy=True) == pytest.approx(1.8)
    # 3 AR rows and 5 others: a pass takes 1.8 instead of 1.5, and 4 sequences wait for it.
    assert COST.cycle(5, 4, greedy=True) == pytest.approx(1.5 + 4 * 0.3)
    sampled = replace(COST, sampled_row=0.1)
    assert sampled.ar(4, greedy=False) == pytest.approx(1.9)
    assert sampled.cycle(5, 4, greedy=False) == pytest.approx(1.9 + 4 * (1.8 + 0.8 - 1.9))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ngram") / "model", diffusion=False)


def engine(path: Path, schedule: str, cost: NgramCost | None = None, **settings: Any) -> Engine:
    """An engine that plans with the costs `cost`, whatever passes take."""
    fixed = {"model": str(path), "schedule": schedule, "adaptive_draft": False, "device": "cpu"}
    made = Engine.from_pretrained(EngineConfig.model_validate(fixed | {"kv_cache_tokens": 8192} | settings))
    if schedule == "ngram" and cost is not None:
        made.use_schedule(NgramSchedule(cost, LENGTHS, 32, 512))
    return made


def texts(results: list[list[Completion]]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs, c.finish_reason) for choices in results for c in choices]


def random_tokens(count: int, vocab: int = 120, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(count)]


def decode(
    schedule: NgramSchedule, prompt: list[int], text: list[int], cost: NgramCost, ahead: bool
) -> tuple[float, float]:
    """Let a schedule decode a known text without a model. Returns tokens per cycle, and the speed over AR steps.

    ahead: an AR step's pick is known only when the turn after it has been planned.
    """
    params = SamplingParams(temperature=0.0)
    length = len(prompt) + len(text)
    sequence = SequenceState("r", 0, params, 0, [*prompt, text[0]], len(prompt), length, frozenset())
    cycles, seconds = 0, 0.0

    def finish(turn: Turn) -> None:
        nonlocal cycles, seconds
        rows, done = len(turn.groups[0].tokens), len(sequence.tokens) - len(prompt)
        commit = schedule.commit(sequence, turn, [text[done : done + rows]])
        assert commit.tokens == text[done : done + len(commit.tokens)]
        sequence.tokens.extend(commit.tokens)
        cycles += 1
        seconds += cost.step(1) if turn.kind == STEP else cost.verify(rows)

    turn = schedule.plan(sequence, 1)
    while len(sequence.tokens) < length:
        if ahead and turn.can_advance and len(sequence.tokens) + 1 < length:
            sequence.placeholders += schedule.advance(sequence, turn, [[-1]])
            following = schedule.plan(sequence, 1)
            sequence.placeholders.clear()
            finish(turn)
            turn = following
        else:
            finish(turn)
            if len(sequence.tokens) < length:
                turn = schedule.plan(sequence, 1)
    return (len(text) - 1) / cycles, (len(text) - 1) / seconds


WAYS = pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
COSTS = pytest.mark.parametrize("cost", [COST, GPU_COST], ids=["rows cost", "rows are free"])


@COSTS
@WAYS
def test_where_nothing_repeats_hardly_any_time_is_lost(cost: NgramCost, ahead: bool) -> None:
    """N-grams of a small vocabulary occur again by chance, and what followed them does not."""
    schedule = NgramSchedule(cost, LENGTHS, 32, 512)
    runs = [
        decode(schedule, [], random_tokens(1000, vocab, seed), cost, ahead)
        for vocab in (20, 60, 200)
        for seed in range(3)
    ]
    assert harmonic_mean([speed for _, speed in runs]) > 0.99, runs


@COSTS
@WAYS
def test_a_text_with_small_edits_comes_many_tokens_at_a_time(cost: NgramCost, ahead: bool) -> None:
    rng = random.Random(1)
    prompt = random_tokens(1000, 5000)
    edited = [token if rng.random() > 0.03 else 5000 + rng.randrange(500) for token in prompt]
    per_cycle, speed = decode(NgramSchedule(cost, LENGTHS, 32, 512), prompt, edited, cost, ahead)
    assert per_cycle > (4.0 if ahead else 5.0) and speed > 2.5, (per_cycle, speed)


@WAYS
def test_a_text_that_repeats_is_drafted_for_whatever_came_before_it(ahead: bool) -> None:
    schedule = NgramSchedule(COST, LENGTHS, 32, 512)
    for seed in range(3):
        decode(schedule, [], random_tokens(1000, 20, seed), COST, ahead)
    prompt = random_tokens(300, 5000)
    assert decode(schedule, prompt, prompt, COST, ahead)[0] > 4.0


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_text_is_that_of_ar_decoding(plain: Path, temperature: float, ahead: bool) -> None:
    # A bias makes a text of few words.
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=60, ignore_eos=True, logit_bias={7: 6.0, 11: 6.0}
    )
    prompts = [random_tokens(40, seed=seed) for seed in range(2)]
    ours = engine(plain, "ngram", COST)
    ours.use_runner(EagerRunner(ours.forward, ours.cache, feeds_tokens=ahead))
    passes: list[PassRecord] = []
    ours.observer = passes.append
    assert texts(ours.generate(prompts, params)) == texts(engine(plain, "ar").generate(prompts, params))
    assert ours.stats.tokens_per_cycle > 1.5
    assert any(one.next_launched_ahead for one in passes) is ahead


class Engines:
    """orthrus-tiny with n-gram drafts, with diffusion blocks, and with both. Costs are given, not measured."""

    def __init__(self) -> None:
        tokens = load_tokenizer(TINY).encode(Path(__file__).read_text())
        # Passages, and after each its beginning.
        self.prompts = [tokens[at : at + 64] + tokens[at : at + 12] for at in (0, 500)]

    def run(self, name: str, params: SamplingParams) -> tuple[Engine, list[tuple[Any, ...]], dict[str, int]]:
        """The engine, the texts, and how many turns of each kind there were."""
        made = engine(TINY, "ngram" if name == "ngram" else "orthrus", COST)
        planner = DraftPlanner(16, DecodeCost(STEPS, VERIFIED, VERIFIED), 512, lead=False)
        mask = made.model_config.mask_token_id
        assert mask is not None
        blocks = OrthrusSchedule(planner, mask, made.max_model_len)
        if name != "ngram":
            made.use_schedule(NgramSchedule(COST, LENGTHS, 32, 512, blocks) if name == "both" else blocks)
        kinds: dict[str, int] = {}

        def count(record: PassRecord) -> None:
            for turn in record.turns:
                kinds[turn.turn.kind] = kinds.get(turn.turn.kind, 0) + 1

        made.observer = count
        got = [made.generate([prompt], params)[0] for prompt in self.prompts]
        return made, texts(got), kinds


def test_a_prompt_that_asks_for_its_own_text_back_and_both_drafters_together(ar: Engine) -> None:
    engines = Engines()
    params = SamplingParams(temperature=0.0, max_tokens=33, ignore_eos=True)
    expected = texts([ar.generate([prompt], params)[0] for prompt in engines.prompts])
    runs = {name: engines.run(name, params) for name in ("ngram", "orthrus", "both")}
    assert all(got == expected for _, got, _ in runs.values())
    per_cycle = {name: made.stats.tokens_per_cycle for name, (made, _, _) in runs.items()}
    assert per_cycle["ngram"] >= 2.5, per_cycle
    per_pass = {name: made.stats.committed / sum(kinds.values()) for name, (made, _, kinds) in runs.items()}
    assert per_pass["both"] >= max(per_pass["ngram"], per_pass["orthrus"]), per_pass
    kinds = runs["both"][2]
    assert kinds[NGRAM_VERIFY] > 0 and kinds[DRAFT] == kinds[VERIFY] > 0, kinds


def test_a_request_may_have_lookups_alone(tiny_orthrus: Path) -> None:
    ours = engine(tiny_orthrus, "orthrus")
    kinds: set[str] = set()

    def note(record: PassRecord) -> None:
        kinds.update(turn.turn.kind for turn in record.turns)

    ours.observer = note
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={7: 6.0, 11: 6.0})
    [[looked_up]] = ours.generate([[1, 2, 3]], replace(params, schedule="ngram"))
    assert NGRAM_VERIFY in kinds and not kinds & {DRAFT, VERIFY}
    kinds.clear()
    # Without measured costs there is nothing to choose by: blocks only.
    [[drafted]] = ours.generate([[1, 2, 3]], params)
    assert {DRAFT, VERIFY} <= kinds and NGRAM_VERIFY not in kinds
    assert looked_up.token_ids == drafted.token_ids
    assert looked_up.stats.tokens_per_cycle > 1.5


def test_settings_of_lookups_say_what_to_change(plain: Path) -> None:
    for settings, said in (
        ({"schedule": "ngram", "prompt_lookup_max": 0}, "use schedule 'ar'"),
        ({"prompt_lookup_max": 2, "prompt_lookup_min": 3}, "below prompt_lookup_min 3"),
        ({"schedule": "ar", "prompt_lookup_max": 3}, "no meaning with schedule 'ar'"),
    ):
        with pytest.raises(ValueError, match=said):
            EngineConfig.model_validate({"model": str(plain)} | settings)
    without = Engine.from_pretrained(EngineConfig(model=str(plain), prompt_lookup_max=0, device="cpu"))
    assert without.schedule_name == "ar"
