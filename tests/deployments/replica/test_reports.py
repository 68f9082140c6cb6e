"""Reports of replicas of another version: during a rolling update both versions run."""

import random
from typing import Any

import pytest

from orthrus.deployments.autoscaling import EngineLoadPolicy
from orthrus.deployments.replica.reports import NAME_BYTES, Capacity, Load, RoutingReport, request_name
from orthrus.deployments.routing.balancer import PrefixBalancer
from orthrus.requests.request import Request, SamplingParams
from tests.deployments.test_autoscaling import context

CAPACITY = Capacity(max_num_seqs=2, prefill_chunk=256, page_size=16, pages=64)
WHOLE = {
    "sequences": 1,
    "prompts": 0.5,
    "pages": 3,
    "requests": request_name("a"),
    "prefixes": bytes(2 * NAME_BYTES),
}
BUSY = {"row_use": 0.9, "queue_wait": 5.0, "kv_use": 0.1, "admitted_rate": 0.1}


def test_a_report_is_read_as_it_was_made() -> None:
    report = RoutingReport.read(WHOLE)
    assert report.load == Load(1, 0.5, 3) and report.requests == {request_name("a")}
    assert report.prefixes == {bytes(NAME_BYTES)}
    assert Capacity.read(CAPACITY._asdict()) == CAPACITY


@pytest.mark.parametrize("missing", WHOLE)
def test_a_report_without_a_key_still_routes(missing: str) -> None:
    """A report with an unknown key does too."""
    report = {name: value for name, value in WHOLE.items() if name != missing} | {"of_tomorrow": 1}
    balancer = PrefixBalancer(rng=random.Random(0))
    balancer.update({"old": (CAPACITY, report), "new": (CAPACITY, WHOLE)})
    for name in ("first", "second"):
        balancer.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=4)))
    # One sequence runs on each, and each has two slots; without its number, as many fit as there are slots.
    assert {replica for _, replica in balancer.dispatch()} <= {"old", "new"} and not balancer.waiting
    balancer.update({"old": (CAPACITY, report), "new": (CAPACITY, WHOLE)})
    assert balancer.requests("old") + balancer.requests("new") == 2


def test_a_replica_that_publishes_no_capacity_is_unknown() -> None:
    published: dict[str, Any] = CAPACITY._asdict()
    assert Capacity.read({}) is None
    assert Capacity.read({name: published[name] for name in ("max_num_seqs", "pages")}) is None
    assert Capacity.read(published | {"of_tomorrow": 1}) == CAPACITY


@pytest.mark.parametrize("missing", ["queue_wait", "kv_use", "admitted_rate"])
def test_the_policy_uses_the_signals_that_there_are(missing: str) -> None:
    policy = EngineLoadPolicy(target_row_use=0.5, max_queue_wait_s=1.0)
    ctx = context(BUSY, queued=5)
    signals = {name: values for name, values in ctx.aggregated_metrics.items() if name != missing}
    ctx.aggregated_metrics = signals
    assert missing not in ctx.aggregated_metrics and policy.decide(ctx).replicas == 2
