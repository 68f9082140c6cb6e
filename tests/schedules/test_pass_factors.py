"""Wrong costs are corrected by the times of passes while the engine works."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.requests.request import SamplingParams
from orthrus.schedules.ar import STEP
from orthrus.schedules.blocks import DRAFT, LEAD_DRAFT, TREE, VERIFY
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import BlockPlan, Draft, DraftPlanner
from orthrus.schedules.protocol import PassTime
from tests.checkpoints import make_checkpoint

FLAT = PassCost((1, 64, 256), (1.0, 1.1, 2.0), seconds_per_sequence=0.01)


def cost() -> DecodeCost:
    return DecodeCost(FLAT, FLAT, FLAT, FLAT, FLAT)


def test_a_factor_moves_to_the_median_of_what_passes_take() -> None:
    one, rng = cost(), random.Random(0)
    for _ in range(600):
        # One pass in ten is held up.
        held_up = 50.0 if rng.random() < 0.1 else 0.0
        one.observe(PassTime(VERIFY, 32, 1, 1, 1.5 * FLAT(32) * rng.uniform(0.98, 1.02) + held_up))
    assert one.factors[VERIFY] == pytest.approx(1.5, rel=0.06)
    assert one.version > 5
    # The other kinds, which have not run, are taken to be slower too, but not by as much.
    assert one.factors[STEP] == one.factors[DRAFT] == one.factors[TREE]
    assert 1.2 < one.factors[STEP] < 0.95 * one.factors[VERIFY]
    assert one.cycle(32, 1, True) == pytest.approx(FLAT(32) * (one.factors[DRAFT] + one.factors[VERIFY]))


def test_a_pass_is_compared_with_the_cost_of_its_kind_and_size() -> None:
    one = cost()
    for _ in range(800):
        one.observe(PassTime(STEP, 64, 64, 64, FLAT(64)))
        one.observe(PassTime(DRAFT, 4 * 31, 4, 4, FLAT(128, 4)))
        one.observe(PassTime(LEAD_DRAFT, 4 * 33, 8, 4, FLAT(128, 4)))
        one.observe(PassTime(VERIFY, 64, 2, 2, FLAT(64, 2)))
        one.observe(PassTime(VERIFY, 64, 9, 2, 2 * FLAT(64, 2)))
        one.observe(PassTime("prefill", 64, 1, 1, 9.0))
    # As measured, but for trees.
    assert all(
        one.factors[kind] == pytest.approx(1.0, abs=0.07) for kind in (STEP, DRAFT, LEAD_DRAFT, VERIFY)
    )
    assert one.factors[TREE] == pytest.approx(2.0, rel=0.07)


def test_a_busy_machine_changes_no_choice() -> None:
    """All passes take longer, and only blocks run. They must not seem dearer than AR steps, which are not timed meanwhile."""
    one = cost()
    before = one.cycle(8, 1, True) / one.ar(1, True)
    for _ in range(600):
        for kind, rows in ((DRAFT, 7), (VERIFY, 8)):
            one.observe(PassTime(kind, rows, 1, 1, 1.3 * FLAT(8)))
    assert one.factors[VERIFY] == pytest.approx(1.3, rel=0.05)
    assert one.cycle(8, 1, True) / one.ar(1, True) == pytest.approx(before, rel=0.08)


def test_a_planner_that_was_told_wrong_costs_changes_its_mind() -> None:
    """Blocks that seemed to cost eight AR steps cost two, and the other way round."""
    dear = replace(FLAT, seconds=(4.0, 4.4, 8.0))
    for told, real, first, later in ((dear, FLAT, False, True), (FLAT, dear, True, False)):
        one = DecodeCost(FLAT, told, told)
        planner = DraftPlanner(8, one, 512, lead=False)
        for _ in range(50):
            planner.observe(True, Draft([0] * 7), 3)
        assert planner.pays(True, 1) == first
        for _ in range(2000):
            one.observe(PassTime(STEP, 1, 1, 1, FLAT(1)))
            for kind, rows in ((DRAFT, 7), (VERIFY, 8)):
                one.observe(PassTime(kind, rows, 1, 1, real(8)))
        assert planner.pays(True, 1) == later
        assert (planner.plan(True, 1) == BlockPlan(1)) != later


def test_an_engine_reports_its_passes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", noise=0.02)
    config = EngineConfig(
        model=str(path), adaptive_draft=False, kv_cache_tokens=2048, prompt_lookup_max=0, draft_length=6
    )
    engine = Engine.from_pretrained(config)
    seen: list[PassTime] = []
    engine.schedule_context().watch(seen.append)
    engine.generate([[1, 2, 3], [4, 5, 6]], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    drafts = [time for time in seen if time.kind == DRAFT and time.sequences == 2]
    verified = [time for time in seen if time.kind == VERIFY and time.sequences == 2]
    assert drafts and verified
    assert {(time.rows, time.groups) for time in drafts} >= {(10, 2)}
    assert {(time.rows, time.groups) for time in verified} >= {(12, 2)}
    assert all(0 < time.seconds < 60 for time in seen)
