"""A config's settings of the request router: they change nothing else of it, and those that can't work are named."""

import copy
from typing import Any

import pytest
import yaml

from orthrus.deployments.app import build
from orthrus.deployments.config.app_args import parse_args
from orthrus.errors import ConfigError
from tests.conftest import ROOT


def args_with(**settings: Any) -> dict[str, Any]:
    """The args of the small model's config with these settings of the replicas' router."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    args: dict[str, Any] = copy.deepcopy(config["applications"][0]["args"])
    args["replica"]["request_router_config"] = settings
    return args


def router_of(args: dict[str, Any]) -> Any:
    """The router that Serve is told to make."""
    replica = build(args)._bound_deployment.init_args[0]
    return replica._bound_deployment._deployment_config.request_router_config


def test_a_setting_without_a_class_is_one_of_our_router() -> None:
    ours = "orthrus.deployments.router.PrefixRouter"
    router = router_of(args_with(request_router_kwargs={"load_bound": 2.0}))
    assert (router.request_router_class, router.request_routing_stats_period_s) == (ours, 1.0)
    assert router.request_router_kwargs == {"load_bound": 2.0}
    router = router_of(args_with(request_routing_stats_period_s=0.5))
    assert (router.request_router_class, router.request_routing_stats_period_s) == (ours, 0.5)


def test_another_router_is_taken_with_its_own_settings() -> None:
    name = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"
    router = router_of(args_with(request_router_class=name, request_router_kwargs={"any": 1}))
    assert (router.request_router_class, router.request_router_kwargs) == (name, {"any": 1})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bound": 2}, "request_router_kwargs: got an unexpected keyword argument 'bound'"),
        ({"load_bound": 0.5}, "load_bound must be at least 1, got 0.5"),
        ({"affinity_floor": "low"}, "request_router_kwargs: '<=' not supported between"),
    ],
)
def test_a_setting_that_can_t_work_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args_with(request_router_kwargs=settings))
    assert str(caught.value).startswith(f"args.replica.request_router_config: {said}")
