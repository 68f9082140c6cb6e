"""The autoscaling decisions that are kept for the page."""

import pytest

from orthrus.deployments.operations import decisions
from orthrus.deployments.operations.decisions import note_decision, read_decisions


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A dict in place of Ray's key-value store."""
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(decisions, "_internal_kv_initialized", lambda: True)
    monkeypatch.setattr(decisions, "_internal_kv_get", kept.get)
    monkeypatch.setattr(decisions, "_internal_kv_put", kept.__setitem__)
    return kept


def test_changes_of_the_wanted_number_do_not_push_out_scalings(store: dict[str, bytes]) -> None:
    note_decision("app", "d", {"kind": "scaled", "replicas": 2})
    for number in range(50):
        note_decision("app", "d", {"kind": "wanted", "replicas": number})
    told = read_decisions("app", "d")
    assert [one["replicas"] for one in told] == [2, *range(30, 50)]
    assert [one["at"] for one in told] == sorted(one["at"] for one in told)
    assert read_decisions("app", "other") == [] and len(store) == 1
