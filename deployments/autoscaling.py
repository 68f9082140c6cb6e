"""How many replicas: an autoscaling policy of Ray Serve that reads what the engines are really doing.

Replicas export the signals (`engine_load`), `EngineLoadPolicy` turns them into a number, and Serve applies the
`upscale_delay_s`, `downscale_delay_s`, `min_replicas` and `max_replicas` of the YAML to it. The policy's module is
pickled to Serve's controller: it imports nothing heavy.
"""

import logging
import math
from typing import Any, NamedTuple

from ray.exceptions import RayError
from ray.serve.config import AutoscalingContext
from ray.util.metrics import Counter, Gauge

from orthrus.deployments.operations.decisions import note_decision

logger = logging.getLogger("ray.serve")

_WORDS = {"row_use": "rows used", "kv_use": "KV cache used"}


class Decision(NamedTuple):
    """Replicas wanted, before Serve's delays and bounds; which rule said so, and a sentence for the log."""

    replicas: float
    rule: str
    reason: str


class EngineLoadPolicy:
    """Keeps row and KV use near their targets and the queue wait under its limit; idle deployments want no replica.

    target_row_use, target_kv_use: 0 to 1, the use at which a replica is as busy as it should be.
    max_queue_wait_s: once requests wait longer, for a replica or in the queue of each, there must be another one.
    """

    def __init__(
        self, target_row_use: float = 0.7, target_kv_use: float = 0.8, max_queue_wait_s: float = 1.0
    ) -> None:
        for name, target in (("target_row_use", target_row_use), ("target_kv_use", target_kv_use)):
            if not 0 < target <= 1:
                raise ValueError(f"{name} must be over 0 and at most 1, got {target}")
        if max_queue_wait_s <= 0:
            raise ValueError(f"max_queue_wait_s must be over 0, got {max_queue_wait_s}")
        self._targets = {"row_use": target_row_use, "kv_use": target_kv_use}
        self._max_queue_wait = max_queue_wait_s
        self._last: Decision | None = None
        self._last_wanted: int | None = None
        self._target: int | None = None
        tags = ("application", "deployment")
        self._wanted = Gauge(
            "orthrus_autoscaling_wanted_replicas",
            "Replicas that the policy wants, before the delays",
            tags,
        )
        self._scalings = Counter(
            "orthrus_autoscaling_scalings",
            "Changes of the number of replicas, by the rule that asked for them",
            (*tags, "direction", "rule"),
        )

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Serve's interface: called on every tick of the controller; the policy keeps its state in itself."""
        decision = self.decide(ctx)
        self._report(ctx, decision)
        return decision.replicas, {}

    def decide(self, ctx: AutoscalingContext) -> Decision:
        """What the signals of the replicas call for, now."""
        running = ctx.current_num_replicas
        signals = ctx.aggregated_metrics or {}
        if running == 0:
            # Serve itself starts the first replica when a request comes.
            reason = (
                "the first replica starts"
                if ctx.target_num_replicas
                else "a request will start the first replica"
            )
            return Decision(ctx.target_num_replicas, "starting", reason)
        if not signals.get("row_use"):
            return Decision(ctx.target_num_replicas, "starting", "no replica has reported yet")
        if ctx.total_num_requests == 0 and not any(signals["row_use"].values()):
            return Decision(0, "idle", "no requests")

        # The work is the sum over replicas, however many share it: what a new one takes over comes off the others.
        calls = []
        for name, target in self._targets.items():
            # Replicas of another version may not report a signal. Then nothing follows from it.
            if values := list(signals.get(name, {}).values()):
                use, needed = sum(values) / len(values), sum(values) / target
                # Rounded up, as the number of replicas is: 1.004 calls for two, and "1.00" would not say why.
                shown = math.ceil(round(100 * needed, 6)) / 100
                reason = f"{_WORDS[name]} {use:.1%}, target {target:.0%}: needs {shown:.2f} replicas"
                calls.append(Decision(needed, name, reason))
        # A queue in some replicas only needs no other one: new requests go elsewhere, and those in it stay.
        wait = min(signals.get("queue_wait", {}).values(), default=0.0)
        if wait > self._max_queue_wait:
            reason = f"requests have waited {wait:.1f} s everywhere, limit {self._max_queue_wait:.1f} s"
            calls.append(Decision(running + 1, "queue_wait", reason))
        # A mean over time: under 1 it is requests on their way to a replica. By Little's law, its wait is this over the rate
        # at which requests leave the queue.
        queued, rates = ctx.total_queued_requests, signals.get("admitted_rate", {})
        rate = sum(rates.values())
        wait = queued / rate if rate else math.inf
        if queued >= 1 and rates and wait > self._max_queue_wait:
            pace = (
                f"for {wait:.1f} s, limit {self._max_queue_wait:.1f} s"
                if rate
                else "and none has got one lately"
            )
            reason = f"requests wait for a replica, {queued:.0f} of them, {pace}"
            calls.append(Decision(running + 1, "unrouted", reason))
        most = max(calls, key=lambda call: call.replicas)
        # There is work, however little.
        return most._replace(replicas=max(1, most.replicas))

    def _report(self, ctx: AutoscalingContext, decision: Decision) -> None:
        """Log a decision when it differs from the one before, and what Serve made of it; export both."""
        tags = {"application": ctx.app_name or "", "deployment": ctx.deployment_name}
        low, high = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
        wanted = min(max(math.ceil(decision.replicas), low), high)
        self._wanted.set(wanted, tags)
        if self._target is not None and ctx.target_num_replicas != self._target:
            direction = "up" if ctx.target_num_replicas > self._target else "down"
            cause = self._last or decision
            if self._target == 0:
                cause = Decision(1, "first_request", "a request came while no replica ran")
            logger.info(
                "autoscaling %s: scaled %s from %d to %d: %s",
                ctx.deployment_name,
                direction,
                self._target,
                ctx.target_num_replicas,
                cause.reason,
            )
            self._note(
                ctx, kind="scaled", before=self._target, replicas=ctx.target_num_replicas, reason=cause.reason
            )
            self._scalings.inc(1, {**tags, "direction": direction, "rule": cause.rule})
        if wanted != self._last_wanted:
            logger.info(
                "autoscaling %s: %d replicas run, target %d, wanted %d: %s",
                ctx.deployment_name,
                ctx.current_num_replicas,
                ctx.target_num_replicas,
                wanted,
                decision.reason,
            )
            self._note(
                ctx, kind="wanted", before=ctx.current_num_replicas, replicas=wanted, reason=decision.reason
            )
        self._last, self._last_wanted, self._target = decision, wanted, ctx.target_num_replicas

    def _note(self, ctx: AutoscalingContext, **decision: Any) -> None:
        """Keep a decision for who shows it (deployments/page/). The policy goes on without."""
        try:
            note_decision(ctx.app_name or "", ctx.deployment_name, decision)
        except (RayError, RuntimeError) as error:
            logger.warning("the autoscaling decision could not be kept for the page: %s", error)
