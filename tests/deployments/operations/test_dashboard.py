"""The Grafana dashboard uses only metrics that exist, and uses all of the engine's."""

import json
import re

from orthrus.deployments.access.request_metrics import COUNTER, HISTOGRAMS
from orthrus.deployments.replica.engine_metrics import COUNTERS, GAUGES
from tests.conftest import ROOT


def test_the_dashboard_shows_the_metrics_that_are_exported() -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = set(re.findall(r"ray_orthrus_\w+", " ".join(asked)))
    engine = {f"ray_orthrus_engine_{name}_total" for name in COUNTERS}
    engine |= {f"ray_orthrus_engine_{name}" for name in GAUGES}
    histograms = {f"ray_orthrus_{name}_bucket" for name in HISTOGRAMS}
    others = {
        f"ray_orthrus_{COUNTER}_total",
        "ray_orthrus_autoscaling_scalings_total",
        "ray_orthrus_autoscaling_wanted_replicas",
        "ray_orthrus_routed_requests_total",
    }
    assert names == engine | histograms | others
    guide = (ROOT / "docs" / "operations.md").read_text()
    for name in names:
        assert name.removeprefix("ray_orthrus_").removesuffix("_bucket") in guide, (
            f"docs/operations.md does not explain {name}"
        )
