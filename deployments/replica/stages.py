"""What each starting replica is doing, for `orthrus serve` to show: kept in the cluster's key-value store while it loads."""

from ray import serve
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from orthrus.loading import tell_stages

_PREFIX = "orthrus/stage"


def publish_stages() -> None:
    """Publish each stage of loading the model in this replica's process, from now on until `clear_stages`."""
    key = _own_key()
    tell_stages(lambda stage: _internal_kv_put(key, stage.encode()))


def clear_stages() -> None:
    """Remove this replica's stage: it has been loaded."""
    _internal_kv_del(_own_key())


def read_stages(application: str) -> list[str]:
    """The stages of the application's starting replicas, sorted."""
    values = [_internal_kv_get(key) for key in _internal_kv_list(f"{_PREFIX}/{application}/")]
    return sorted(value.decode() for value in values if value is not None)


def _own_key() -> str:
    context = serve.get_replica_context()
    return f"{_PREFIX}/{context.app_name}/{context.replica_id.unique_id}"
