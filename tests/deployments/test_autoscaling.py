"""The autoscaling policy as a function of the signals: Serve's own context and Serve's own delays, no cluster."""

import logging
import time
from dataclasses import fields
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from orthrus.deployments.autoscaling import EngineLoadPolicy
from orthrus.deployments.replica.reports import engine_load
from orthrus.engine.stats import EngineStats

DEPLOYMENT = DeploymentID(name="OrthrusReplica", app_name="orthrus")


def context(
    *replicas: dict[str, float],
    target: int | None = None,
    requests: float = 1,
    queued: float = 0,
    config: AutoscalingConfig | None = None,
    state: dict[str, Any] | None = None,
) -> AutoscalingContext:
    """What Serve's controller hands to a policy while `replicas` report these signals (0 where not given)."""
    ids = [ReplicaID(f"r{i}", DEPLOYMENT) for i in range(len(replicas))]
    names = ("row_use", "queue_wait", "kv_use", "admitted_rate", "tokens_per_cycle")
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas) if target is None else target,
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=lambda: {
            name: {i: r.get(name, 0.0) for i, r in zip(ids, replicas, strict=True)} for name in names
        },
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=config or AutoscalingConfig(min_replicas=0, max_replicas=8),
    )


POLICY = EngineLoadPolicy(target_row_use=0.5, target_kv_use=0.8, max_queue_wait_s=2.0)


@pytest.mark.parametrize(
    ("ctx", "replicas", "rule"),
    [
        (context({"row_use": 0.5}), 1, "row_use"),
        (context({"row_use": 1.0}), 2, "row_use"),
        # The same work on two replicas, one of them new: two stay. One is enough when half of the work is gone.
        (context({"row_use": 1.0}, {}), 2, "row_use"),
        (context({"row_use": 0.25}, {"row_use": 0.25}), 1, "row_use"),
        (context({"row_use": 0.1, "kv_use": 1.0}, {"kv_use": 1.0}), 2.5, "kv_use"),
        (context({"row_use": 0.1, "queue_wait": 2.1}), 2, "queue_wait"),
        (context({"row_use": 0.1, "queue_wait": 1.9}), 1, "row_use"),
        # Requests that wait on one replica stay there, so another replica would not help them.
        (context({"row_use": 0.2, "queue_wait": 9.0}, {"row_use": 0.1}), 1, "row_use"),
        (context({"row_use": 0.2, "queue_wait": 9.0}, {"row_use": 0.1, "queue_wait": 2.5}), 3, "queue_wait"),
        # Three wait for a replica; four in ten seconds get one, or two a second of each of two replicas.
        (context({"row_use": 0.1, "admitted_rate": 0.4}, queued=3), 2, "unrouted"),
        (context({"row_use": 0.1, "admitted_rate": 2}, {"admitted_rate": 2}, queued=3), 1, "row_use"),
        (context({"row_use": 0.1}, queued=3), 2, "unrouted"),
        (context({"row_use": 0.1}, queued=0.9), 1, "row_use"),
        (context({"row_use": 0.001}), 1, "row_use"),
        (context({}, requests=1), 1, "row_use"),
        (context({}, {}, requests=0), 0, "idle"),
        (context({"row_use": 0.2}, requests=0), 1, "row_use"),
        (context(target=0, requests=0), 0, "starting"),
        (context(target=1), 1, "starting"),
    ],
)
def test_what_the_signals_call_for(ctx: AutoscalingContext, replicas: float, rule: str) -> None:
    decision = POLICY.decide(ctx)
    assert (decision.replicas, decision.rule) == (pytest.approx(replicas), rule)


def test_replicas_that_have_not_reported_change_nothing() -> None:
    ctx = context({}, {}, target=3)
    ctx.aggregated_metrics = {}
    assert POLICY.decide(ctx)[:2] == (3, "starting")


@pytest.mark.parametrize(
    "kwargs",
    [{"target_row_use": 0}, {"target_row_use": 1.5}, {"target_kv_use": -1}, {"max_queue_wait_s": 0}],
)
def test_settings_out_of_range_are_named(kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        EngineLoadPolicy(**kwargs)


def test_serve_applies_delays_bounds_and_scale_to_zero() -> None:
    """The policy as Serve runs it: pickled, instantiated from the YAML's keywords, wrapped in Serve's delays."""
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=8,
        upscale_delay_s=0,
        downscale_delay_s=3600,
        downscale_to_zero_delay_s=0,
        policy=AutoscalingPolicy(
            policy_function="orthrus.deployments.autoscaling:EngineLoadPolicy",
            policy_kwargs={"target_row_use": 0.5},
        ),
    )
    assert len(config.policy.get_serialized_policy_def() or b"") < 20_000
    made = cloudpickle.loads(config.policy.get_serialized_policy_def())(**config.policy.policy_kwargs)
    serve_calls = _apply_autoscaling_config(made)
    assert serve_calls(context({"row_use": 1.0}, config=config))[0] == 2
    assert serve_calls(context({"row_use": 0.1}, {}, config=config))[0] == 2, "the delay has not passed"
    assert serve_calls(context({}, requests=0, config=config))[0] == 0
    assert serve_calls(context(requests=1, config=config))[0] == 1, "a first request starts a replica at once"


def test_decisions_are_logged_once_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    policy = EngineLoadPolicy(target_row_use=0.5)
    with caplog.at_level(logging.INFO, "ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        try:
            for ctx in (
                context({"row_use": 0.4}),
                context({"row_use": 0.9}),
                context({"row_use": 0.95}),
                context({"row_use": 0.9}, target=2),
                context(target=0, requests=0),
                context(target=1),
            ):
                policy(ctx)
        finally:
            logging.getLogger("ray.serve").removeHandler(caplog.handler)
    lines = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert [line.split(": ", 1)[1] for line in lines] == [
        "1 replicas run, target 1, wanted 1: rows used 40.0%, target 50%: needs 0.80 replicas",
        "1 replicas run, target 1, wanted 2: rows used 90.0%, target 50%: needs 1.80 replicas",
        "scaled up from 1 to 2: rows used 95.0%, target 50%: needs 1.90 replicas",
        "scaled down from 2 to 0: rows used 90.0%, target 50%: needs 1.80 replicas",
        "0 replicas run, target 0, wanted 0: a request will start the first replica",
        "scaled up from 0 to 1: a request came while no replica ran",
        "0 replicas run, target 1, wanted 1: the first replica starts",
    ]


@pytest.mark.parametrize(("use", "needed"), [(0.35, "1.00"), (0.3501, "1.01")])
def test_a_reason_shows_why_the_number_is_rounded_up(use: float, needed: str) -> None:
    decision = EngineLoadPolicy(target_row_use=0.7).decide(context({"row_use": use}, {"row_use": use}))
    assert decision.reason == f"rows used 35.0%, target 70%: needs {needed} replicas"


def test_work_for_just_30_replicas_does_not_call_for_31() -> None:
    """28 replicas have a use of 21 in all, and 21 / 0.7 is a little over 30 in floating point."""
    decision = EngineLoadPolicy(target_row_use=0.7).decide(context(*[{"row_use": 0.75}] * 28))
    assert decision.replicas == 30


def test_signals_are_rates_of_the_engines_counters() -> None:
    names = [field.name for field in fields(EngineStats)]
    zero = EngineStats(**{**dict.fromkeys(names, 0), "kv_pages_total": 50})
    busy = EngineStats(
        passes=20,
        cycles=10,
        committed=35,
        preemptions=0,
        prompt_tokens=100,
        prefix_hit_tokens=64,
        admitted=5,
        queue_wait_seconds=2.0,
        row_use_seconds=1.5,
        running=4,
        waiting=1,
        rows_to_prefill=12,
        oldest_queued_at=time.monotonic() - 0.75,
        kv_pages_used=20,
        kv_pages_total=50,
    )
    expected = {
        "row_use": 0.5,
        "queue_wait": pytest.approx(0.75, abs=0.2),
        "kv_use": 0.4,
        "admitted_rate": 2.5,
        "tokens_per_cycle": 3.5,
    }
    assert engine_load(zero, busy, 2.0) == {**expected, "row_use": 0.75}
    assert engine_load(busy, busy, 2.0) == {**expected, "row_use": 0.0, "admitted_rate": 0.0}
