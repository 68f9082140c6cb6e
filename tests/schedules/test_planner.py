"""The planner drafts where it pays, and takes AR steps where it doesn't. Its costs are measured."""

import random
from dataclasses import replace
from itertools import pairwise
from statistics import harmonic_mean, mean, median

import pytest

from orthrus.plan import RowGroup, View
from orthrus.schedules import pass_cost
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.pass_cost import PassCost, PassTimer
from orthrus.schedules.planner import BlockPlan, Draft, DraftPlanner


def flat() -> PassCost:
    """Rows are almost free, as where a pass costs one read of the weights."""
    return PassCost((1, 256), (1.0, 1.25))


def dear() -> PassCost:
    """Every row costs as much as the first."""
    return PassCost((1, 256), (1.0, 256.0))


def test_pass_cost_interpolates_and_goes_on_in_proportion() -> None:
    cost = PassCost((2, 4, 8), (1.0, 2.0, 6.0), seconds_per_sequence=0.5)
    assert [cost(1), cost(2), cost(3), cost(6), cost(8), cost(16)] == [1.0, 1.0, 1.5, 4.0, 6.0, 12.0]
    assert cost(4, sequences=3) == 3.0
    filled = replace(cost, filled_to=(4, 8))
    assert [filled(1), filled(5), filled(8), filled(16)] == [2.0, 6.0, 6.0, 12.0]


def planner(
    cost: PassCost, max_rows: int, *, lead: PassCost | None = None, pass_rows: int = 512
) -> DraftPlanner:
    """A planner for passes that all cost the same, but for draft passes with a lead, which cost twice as much if not given."""
    double = PassCost(cost.sizes, tuple(2 * seconds for seconds in cost.seconds))
    return DraftPlanner(max_rows, DecodeCost(cost, cost, cost, lead or double), pass_rows)


def drafted(count: int, *, lead: bool = False, first_agreed: bool = False) -> Draft:
    return Draft([0] * count, lead, first_agreed)


def test_long_blocks_where_rows_are_free_and_none_where_they_are_dear() -> None:
    free, costly = planner(flat(), 16), planner(dear(), 16)
    for one in (free, costly):
        for _ in range(400):
            one.observe(True, drafted(15), 6)
    # Six drafts were always accepted and the seventh never: the block is they and the token before them.
    assert free.plan(True, 1) == BlockPlan(7)
    assert costly.plan(True, 1) == BlockPlan(1)


def test_a_lead_where_first_drafts_fail_and_its_pass_is_cheap() -> None:
    one = planner(flat(), 8, lead=flat())
    for _ in range(200):
        one.observe(True, drafted(7, lead=True), 3)
    plans = [one.plan(True, 1) for _ in range(600)]
    assert plans.count(BlockPlan(4, lead=True)) >= 595
    assert any(not plan.lead for plan in plans), "the second best is never looked at"
    # Blocks whose first token is right anyway don't need one that costs.
    assert planner(flat(), 8).plan(True, 1) == BlockPlan(8)
    dear_lead = planner(flat(), 8)
    for _ in range(400):
        dear_lead.observe(True, drafted(7, lead=True, first_agreed=True), 3)
    assert dear_lead.plan(True, 1) == BlockPlan(5)


def test_blocks_fit_the_rows_of_a_pass() -> None:
    assert planner(flat(), 16, pass_rows=64).plan(True, 8).rows <= 8
    assert planner(flat(), 16, pass_rows=64).plan(True, 64) == BlockPlan(1)
    assert DraftPlanner(16, None, 64).plan(True, 8) == BlockPlan(8)
    crowded = DraftPlanner(16, None, 64)
    assert crowded.plan(True, 33) == BlockPlan(1) and not crowded.pays(True, 33), "no block fits"
    assert crowded.could_pay(True, 32) and not crowded.could_pay(True, 33)
    assert DraftPlanner(16, None, 64, lead=True).plan(True, 1) == BlockPlan(16, lead=True)
    assert DraftPlanner(16, None, 64, lead=True).plan(True, 8) == BlockPlan(7, lead=True)


def test_where_plain_decoding_wins_there_are_probes_now_and_then() -> None:
    one = planner(flat(), 8)
    for _ in range(200):
        one.observe(True, drafted(7), 0)
        one.observe(True, drafted(7, lead=True), 0)
    decisions = [one.plan(True, 1).rows for _ in range(10_000)]
    assert 1 <= sum(rows > 1 for rows in decisions) <= 3
    for _ in range(200):
        one.observe(True, drafted(7), 7)
    assert one.plan(True, 1) == BlockPlan(8)


def crowded(seconds_per_sequence: float) -> DraftPlanner:
    """A planner for which rows are free. Each sequence after the first makes a cycle `seconds_per_sequence` AR steps longer."""
    passes = replace(flat(), seconds_per_sequence=seconds_per_sequence)
    return DraftPlanner(8, DecodeCost(flat(), passes, passes, passes), 512)


def looks(one: DraftPlanner, batch: int, passes: int) -> list[int]:
    """The numbers of the passes of a batch that draft, with all sequences or none. Between them, a single sequence drafts."""
    drafting = []
    for number in range(passes):
        assert one.plan(True, 1).rows > 1
        blocks = {one.plan(True, batch).rows > 1 for _ in range(batch)}
        assert len(blocks) == 1
        drafting += [number] if True in blocks else []
    return drafting


def test_a_batch_probes_in_one_pass_and_more_seldom_if_probes_cost_more() -> None:
    better, worse = crowded(0.2), crowded(0.2)
    for _ in range(100):
        better.observe(True, drafted(7), 4)
        worse.observe(True, drafted(7), 2)
    often, seldom = looks(better, 8, 3000), looks(worse, 8, 3000)
    assert len(often) >= 2 * len(seldom) >= 2
    # Evenly spread, although a single sequence, for which drafts pay, has drafted all the time.
    assert {b - a for a, b in pairwise(often)} == {often[0] + 1}


def test_a_few_easy_sequences_do_not_make_a_crowded_batch_draft_and_many_do() -> None:
    one = crowded(0.2)
    for _ in range(1000):
        one.observe(True, drafted(7), 2)
    for _ in range(30):
        one.observe(True, drafted(7), 7)
    assert one.plan(True, 1).rows == 8
    assert one.plan(True, 8) == BlockPlan(1) and one.could_pay(True, 8)
    for _ in range(1000):
        one.observe(True, drafted(7), 7)
    assert one.plan(True, 8).rows == 8


def test_drafts_that_would_not_pay_even_if_nearly_always_right_are_never_tried() -> None:
    hopeless = crowded(0.5)
    for _ in range(200):
        hopeless.observe(True, drafted(7), 7)
    assert looks(hopeless, 8, 5000) == [] and not hopeless.could_pay(True, 8)


def test_greedy_and_sampled_text_are_counted_apart_and_sampling_has_its_cost() -> None:
    one = planner(flat(), 8)
    for _ in range(100):
        one.observe(False, drafted(7), 0)
        one.observe(False, drafted(7, lead=True), 0)
    assert one.plan(True, 1).rows > 1
    assert one.plan(False, 1) == BlockPlan(1)
    cost = DecodeCost(flat(), flat(), flat(), flat(), sampled_row=0.1)
    assert cost.ar(4, greedy=False) == pytest.approx(flat()(4) + 0.4)
    assert cost.cycle(3, 4, greedy=False) == pytest.approx(2 * flat()(12) + 0.1 * (8 + 12))
    assert cost.cycle(3, 4, greedy=False, lead=True) == pytest.approx(2 * flat()(12) + 0.1 * (16 + 12))


@pytest.mark.parametrize("trees", [False, True])
def test_measuring_covers_every_kind_of_pass_and_stays_within_the_cache(trees: bool) -> None:
    seen: set[tuple[tuple[View, ...], int, int]] = set()

    def run(groups: list[RowGroup], temperature: float, ahead: bool) -> float:
        assert ahead
        for group in groups:
            assert group.start >= 0 and group.start + len(group.tokens) <= 40
            # The branches of a tree write to page 0, which is nobody's.
            assert min(group.block_table) >= (group.parent is None) and max(group.block_table) < 11
            assert len(group.block_table) * 8 >= group.start + len(group.tokens)
        branching = any(group.parent is not None for group in groups)
        assert trees or not branching
        views = tuple(dict.fromkeys(group.view for group in groups))
        seen.add((views, len(groups[-1].tokens), len(groups)))
        return 1e-3 * sum(len(group.tokens) for group in groups)

    timer = PassTimer(run, context=40, page_size=8, num_pages=11, max_batch=4, max_rows=512, filled_to=())
    cost = DecodeCost.measured(timer, mask_token_id=9, leads=True, trees=trees)
    assert {((View.AR,), 1, 1), ((View.AR,), 1, 4), ((View.AR,), 16, 1), ((View.DIFFUSION,), 16, 1)} <= seen
    assert ((View.AR, View.DIFFUSION), 16, 2) in seen
    assert cost.step.sizes == (1, 2, 4)
    assert cost.lead is not None
    assert (cost.tree.sizes if cost.tree is not None else None) == (cost.draft.sizes if trees else None)
    assert cost.draft.sizes == cost.verify.sizes == cost.lead.sizes == (2, 4, 8, 16, 32, 64, 128)
    assert list(cost.draft.seconds) == sorted(cost.draft.seconds)
    assert cost.verify(128) == pytest.approx(0.128) and cost.step(4) == pytest.approx(0.004)


@pytest.mark.parametrize(("seconds", "largest"), [(0.02, 128), (0.5, 8)])
def test_large_passes_are_measured_unless_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, seconds: float, largest: int
) -> None:
    """0.02 s is a pass of a 72B model on two H200s, whose number of rows hardly matters."""
    monkeypatch.setattr(pass_cost, "_SECONDS", 0.0)  # One round.
    timer = PassTimer(
        lambda groups, temperature, ahead: seconds,
        context=512,
        page_size=8,
        num_pages=300,
        max_batch=4,
        max_rows=128,
        filled_to=(),
    )
    cost = DecodeCost.measured(timer, mask_token_id=9, leads=False, trees=False)
    assert cost.verify.sizes[-1] == cost.draft.sizes[-1] == largest


def cpu_cost() -> DecodeCost:
    """Roughly a CPU's: every row costs something."""
    rows = (2, 4, 8, 16, 32)
    return DecodeCost(
        step=PassCost((1, 2, 4, 8, 16), (1.0, 1.2, 1.5, 2.2, 3.6)),
        draft=PassCost(rows, (1.2, 1.3, 1.6, 2.3, 3.6)),
        verify=PassCost(rows, (1.3, 1.4, 1.8, 2.6, 4.3)),
        lead=PassCost(rows, (1.6, 1.7, 2.0, 2.8, 4.1)),
    )


def decode(one: DraftPlanner, tokens: int, agreement: float, rng: random.Random) -> tuple[float, float]:
    """A greedy text of which drafts agree with this probability: its tokens per cycle, and its speed over AR steps."""
    cost, done, cycles, seconds = cpu_cost(), 0, 0, 0.0
    while done < tokens:
        plan = one.plan(True, 1, begins=cycles == 0)
        cycles += 1
        if plan.rows == 1:
            done, seconds = done + 1, seconds + cost.ar(1, greedy=True)
            continue
        agree = [rng.random() < agreement for _ in range(plan.rows)]
        draft = drafted(plan.rows - 1, lead=plan.lead, first_agreed=plan.lead and agree[-1])
        accepted = [*agree[:-1], False].index(False)
        one.observe(True, draft, accepted)
        done, seconds = done + accepted + 1 + plan.lead, seconds + cost.cycle(plan.rows, 1, True, plan.lead)
    return done / cycles, done / seconds


@pytest.mark.parametrize("bad_tokens", [300, 1000])
def test_a_text_that_drafts_well_is_drafted_for_however_the_one_before_it_went(bad_tokens: int) -> None:
    """The text before it may have ended early. Figures are of the two texts after it, on average over 20 cases."""
    after = []
    for seed in range(20):
        rng = random.Random(seed)
        one = DraftPlanner(16, cpu_cost(), 512)
        decode(one, bad_tokens, 0.2, rng)
        after += [decode(one, 200, 0.75, rng)[0] for _ in range(2)]
    assert mean(after) > 2.3, after


def test_a_known_bad_kind_of_text_is_probed_where_another_text_begins() -> None:
    after = []
    for seed in range(5):
        rng = random.Random(seed)
        one = DraftPlanner(16, cpu_cost(), 512)
        for _ in range(200):
            one.observe(True, drafted(7), 0)
            one.observe(True, drafted(7, lead=True), 0)
        after.append([decode(one, 200, 0.75, rng)[0] for _ in range(20)][-1])
    assert median(after) > 3, after


@pytest.mark.parametrize(("agreement", "tokens"), [(0.1, 200), (0.3, 200), (0.3, 20), (0.5, 200)])
def test_text_that_drafts_badly_costs_next_to_nothing(agreement: float, tokens: int) -> None:
    """All of it, from the first text on."""
    for seed in range(5):
        rng = random.Random(seed)
        one = DraftPlanner(16, cpu_cost(), 512)
        speeds = [decode(one, tokens, agreement, rng)[1] for _ in range(6000 // tokens)]
        assert harmonic_mean(speeds) > 0.98


def test_a_probe_goes_on_as_long_as_it_gains() -> None:
    one = crowded(0.2)
    for _ in range(200):
        one.observe(True, drafted(7), 1)
        one.observe(True, drafted(7, lead=True), 0)
    assert one.plan(True, 8) == BlockPlan(1)
    passes = 0
    while one.plan(True, 8) == BlockPlan(1):
        passes += 1
    assert passes > 100
    for _ in range(3):
        blocks = [one.plan(True, 8) for _ in range(7)]
        assert all(block.rows > 1 for block in blocks), "all eight of the batch"
        for _ in range(8):
            one.observe(True, drafted(blocks[0].rows - 1, lead=blocks[0].lead), blocks[0].rows - 1)
        assert one.plan(True, 8).rows > 1, "it has gained"
    for _ in range(7):
        one.plan(True, 8)
    for _ in range(40):
        one.observe(True, drafted(blocks[0].rows - 1, lead=blocks[0].lead), 0)
    assert {one.plan(True, 8).rows for _ in range(80)} == {1}
