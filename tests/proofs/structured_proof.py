"""2,000 structured answers at temperature 1 under both schedules: `make test-structured` runs it, in minutes."""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.schemas import SCHEMAS
from tests.structured import both_schedules, check, tokens_per_cycle

ANSWERS = 2000


def test_structured_answers_are_valid_and_end() -> None:
    each = -(-ANSWERS // len(SCHEMAS))
    asked = [(name, seed) for name in SCHEMAS for seed in range(each)]
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(both_schedules, [asked[i::processes] for i in range(processes)]))
    plain = [answer for part, _ in parts for answer in part]
    drafted = [answer for _, part in parts for answer in part]
    check(plain, drafted)
    cut = Counter(answer.schema for answer in plain if answer.finish_reason == "length")
    share = 1 - cut.total() / len(plain)
    print(
        f"\n{len(plain)} answers, {share:.1%} ended, {tokens_per_cycle(drafted):.2f} tokens per cycle; cut: {cut}"
    )
    assert share >= 0.95, cut
    assert tokens_per_cycle(drafted) > 1.5
