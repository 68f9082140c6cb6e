"""Several nodes' metrics as one export, in both of Prometheus' formats."""

from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from orthrus.deployments.operations.metrics import merge, spell

NOISE = 'Component="core_worker",SessionName="s",Version="2",otel_scope_name="ray"'


def export(node: str) -> str:
    return (
        f"# HELP ray_serve_num_http_requests_total A.\n# TYPE ray_serve_num_http_requests_total counter\n"
        f'ray_serve_num_http_requests_total{{{NOISE},WorkerId="1",node="{node}"}} 1.0\n'
        f'ray_serve_num_http_requests_total{{{NOISE},WorkerId="2",node="{node}"}} 2.0\n'
        "# HELP ray_serve_long_poll_latency_ms B.\n# TYPE ray_serve_long_poll_latency_ms gauge\n"
        "ray_serve_long_poll_latency_ms 1.0\n"
        "# HELP python_gc_y B.\n# TYPE python_gc_y gauge\npython_gc_y 1.0\n"
        "# HELP ray_orthrus_engine_kv_pages_total C.\n# TYPE ray_orthrus_engine_kv_pages_total gauge\n"
        f'ray_orthrus_engine_kv_pages_total{{{NOISE},WorkerId="1",replica="{node}"}} 64.0\n'
        "# HELP ray_orthrus_z_seconds D \\n \\\\.\n# TYPE ray_orthrus_z_seconds histogram\n"
        f'ray_orthrus_z_seconds_bucket{{{NOISE},WorkerId="1",model="a\\"b\\n\\\\",replica="{node}",le="0.5"}} 1.0\n'
        f'ray_orthrus_z_seconds_bucket{{{NOISE},WorkerId="1",model="a\\"b\\n\\\\",replica="{node}",le="+Inf"}} 2.0\n'
        f'ray_orthrus_z_seconds_count{{{NOISE},WorkerId="1",model="a\\"b\\n\\\\",replica="{node}"}} 2.0\n'
        f'ray_orthrus_z_seconds_sum{{{NOISE},WorkerId="1",model="a\\"b\\n\\\\",replica="{node}"}} 0.9\n'
    )


@pytest.mark.parametrize(
    ("accept", "parse", "media_type"),
    [
        ("", prometheus, "text/plain; version=0.0.4"),
        ("*/*", prometheus, "text/plain; version=0.0.4"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3",
            openmetrics,
            "application/openmetrics-text; version=1.0.0",
        ),
    ],
)
def test_a_family_comes_once_with_the_samples_of_all_nodes(accept: str, parse: Any, media_type: str) -> None:
    text, given = spell(merge([export("a"), export("b"), export("b")]), accept)
    assert given.startswith(media_type)
    families = {family.name: family for family in parse(text.decode())}
    assert set(families) == {
        "ray_serve_num_http_requests",
        "ray_orthrus_engine_kv_pages_total",
        "ray_orthrus_z_seconds",
    }
    requests = families["ray_serve_num_http_requests"].samples
    # The label of the process stays if there is no other label that tells processes apart.
    assert [(s.labels["WorkerId"], s.labels["node"], s.value) for s in requests] == [
        ("1", "a", 1.0),
        ("2", "a", 2.0),
        ("1", "b", 1.0),
        ("2", "b", 2.0),
    ]
    histogram = families["ray_orthrus_z_seconds"].samples
    assert len(histogram) == 8
    assert {frozenset(s.labels) - {"le"} for s in histogram} == {frozenset({"model", "replica"})}
    assert {s.labels["model"] for s in histogram} == {'a"b\n\\'}
    assert text.endswith(b"# EOF\n") == (parse is openmetrics)


def test_without_nodes_there_are_no_metrics() -> None:
    assert spell(merge([]), "")[0] == b""
