"""The application that a config's args become."""

from typing import Any

import yaml

from orthrus.deployments.app import DRAIN_SECONDS, build
from tests.conftest import ROOT


def deployments_of(args: dict[str, Any]) -> dict[str, Any]:
    """Serve's settings of ingress and replica, by the deployment's name."""
    ingress = build(args)._bound_deployment
    replica = ingress.init_args[0]._bound_deployment
    return {deployment.name: deployment._deployment_config for deployment in (ingress, replica)}


def test_streams_may_end_wherever_they_pass_when_an_update_replaces_it() -> None:
    """A stream goes through its ingress to its end. Serve's own default would kill either one after 20 s."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    args = config["applications"][0]["args"]
    settings = deployments_of(args)
    assert {name: one.graceful_shutdown_timeout_s for name, one in settings.items()} == {
        "Ingress": DRAIN_SECONDS,
        "OrthrusReplica": DRAIN_SECONDS,
    }
    args["ingress"] = {"graceful_shutdown_timeout_s": 7.0}
    assert deployments_of(args)["Ingress"].graceful_shutdown_timeout_s == 7.0
