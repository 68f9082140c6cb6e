"""The last decisions of the autoscaling policy, kept in the cluster's key-value store for the web page.

The policy runs in Serve's controller, and ingresses may be on any node. A decision is written when it differs from the one
before, and read only while somebody views the page.
"""

import json
import time
from typing import Any

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized, _internal_kv_put

_PREFIX = "orthrus/decisions"
_KEPT = 20
"""How many decisions of each kind are kept."""


def note_decision(application: str, deployment: str, decision: dict[str, Any]) -> None:
    """Store a decision, a dict of JSON values with its `kind`, together with the time. Does nothing if no Ray runs."""
    if not _internal_kv_initialized():
        return
    known = [*read_decisions(application, deployment), {"at": time.time(), **decision}]
    # Counted by kind: a policy that wavers between two numbers must not push out the actual scalings.
    kept: list[dict[str, Any]] = []
    for one in reversed(known):
        if sum(other["kind"] == one["kind"] for other in kept) < _KEPT:
            kept.insert(0, one)
    _internal_kv_put(_key(application, deployment), json.dumps(kept).encode())


def read_decisions(application: str, deployment: str) -> list[dict[str, Any]]:
    """The last decisions for a deployment, oldest first. Each has `at`, in Unix seconds."""
    stored = _internal_kv_get(_key(application, deployment))
    decisions: list[dict[str, Any]] = json.loads(stored) if stored is not None else []
    return decisions


def _key(application: str, deployment: str) -> str:
    return f"{_PREFIX}/{application}/{deployment}"
