"""Several nodes' metrics as one export."""

from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import merge


def export(node: str) -> str:
    return (
        "# HELP ray_serve_x A.\n# TYPE ray_serve_x gauge\n"
        f'ray_serve_x{{node="{node}"}} 1.0\n'
        "# HELP python_gc_y B.\n# TYPE python_gc_y gauge\npython_gc_y 1.0\n"
        "# HELP ray_orthrus_z C.\n# TYPE ray_orthrus_z histogram\n"
        f'ray_orthrus_z_bucket{{node="{node}",le="+Inf"}} 2.0\nray_orthrus_z_count{{node="{node}"}} 2.0\n'
    )


def test_a_family_comes_once_with_the_samples_of_all_nodes() -> None:
    merged = merge([export("a"), export("b")])
    assert merged.count("# TYPE ray_serve_x") == 1
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert set(families) == {"ray_serve_x", "ray_orthrus_z"}
    assert [sample.labels["node"] for sample in families["ray_serve_x"].samples] == ["a", "b"]
    assert len(families["ray_orthrus_z"].samples) == 4


def test_no_node_no_metrics() -> None:
    assert merge([]) == ""
