"""The Serve configs are what Serve, the engine and the cluster take; one that can't work says where and what to change."""

import copy
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.cli import main
from orthrus.cluster.check import check_config
from orthrus.deployments.access.keys import new_key
from orthrus.deployments.app import build
from orthrus.deployments.config.app_args import parse_args
from orthrus.deployments.config.config_file import load_config
from orthrus.deployments.launch.serve import serve_config
from orthrus.errors import ConfigError
from tests.conftest import ROOT

CLUSTER = ROOT / "ray_cluster.yaml"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
ARGS = TINY["applications"][0]["args"]
Change = Callable[[dict[str, Any]], object]


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_check_says_what_goes_where(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["config", "check", str(path)])
    said = capsys.readouterr()
    assert (status, said.err) == (0, "")
    assert "weights" in said.out and said.out.endswith("ok\n")
    if path.name != "tiny-cpu.yaml":
        ranks, _, kind = path.stem.rpartition("-")[2].rpartition("x")
        assert f"on a node of type {kind}" in said.out
        assert f"on {'each' if ranks else 'one'} {kind.upper()}" in said.out


FAULTS: dict[str, tuple[Change, str]] = {
    "engine key": (
        lambda a: a["engine"].update(max_num_seq=4),
        "args.engine.max_num_seq: unknown key, did you mean 'max_num_seqs'?",
    ),
    "engine type": (lambda a: a["engine"].update(max_num_seqs="x"), "args.engine.max_num_seqs: Input should"),
    "option": (
        lambda a: a["replica"].update(max_ongoing_request=4),
        "args.replica.max_ongoing_request: unknown key, did you mean 'max_ongoing_requests'?",
    ),
    "nested option": (
        lambda a: a["replica"]["autoscaling_config"].update(max_replica=4),
        "args.replica.autoscaling_config.max_replica: unknown key, did you mean 'max_replicas'?",
    ),
    "actor option": (
        lambda a: a["ingress"]["ray_actor_options"].update(cpus=4),
        "args.ingress.ray_actor_options.cpus: unknown key",
    ),
    "policy setting": (
        lambda a: a["replica"]["autoscaling_config"]["policy"]["policy_kwargs"].update(target=1),
        "args.replica.autoscaling_config.policy: policy_kwargs: got an unexpected keyword argument 'target'",
    ),
    "policy value": (
        lambda a: a["replica"]["autoscaling_config"]["policy"]["policy_kwargs"].update(target_row_use=2),
        "target_row_use must be over 0 and at most 1, got 2",
    ),
    "policy": (
        lambda a: a["replica"]["autoscaling_config"]["policy"].update(policy_function="deployments.none:f"),
        "args.replica.autoscaling_config.policy: 'deployments.none:f' can't be imported",
    ),
    "router": (
        lambda a: a["replica"].update(
            request_router_config={"request_router_class": "orthrus.deployments.router.None_"}
        ),
        "args.replica.request_router_config: 'orthrus.deployments.router.None_' can't be imported",
    ),
    "gpu without device": (
        lambda a: a["replica"]["ray_actor_options"].update(num_gpus=1),
        "args.replica.ray_actor_options.num_gpus is 1, and engine.device is cpu",
    ),
    "device without gpu": (
        lambda a: a["engine"].update(device="cuda"),
        "args.replica.ray_actor_options.num_gpus is 0, and a replica on device cuda needs 1",
    ),
    "fewer gpus than ranks": (
        lambda a: (
            a["engine"].update(device="auto", tensor_parallel_size=2),
            a["replica"]["ray_actor_options"].update(num_gpus=1),
        ),
        "args.replica.ray_actor_options.num_gpus is 1, and a replica on device auto needs 2 of its own: set it to 2",
    ),
    "batch never full": (
        lambda a: a["replica"].update(max_ongoing_requests=8),
        "args.replica.max_ongoing_requests 8 keeps the engine from ever running its engine.max_num_seqs 32",
    ),
    "two ways to scale": (lambda a: a["replica"].update(num_replicas=2), "args.replica: Manually setting"),
    "cache under context": (
        lambda a: a["engine"].update(max_model_len=65536),
        "args.engine: the KV cache holds 32768 tokens, fewer than max_model_len 65536",
    ),
    "a lead without drafts": (
        lambda a: a["engine"].update(schedule="ar", draft_lead=True),
        "args.engine: draft_lead has no meaning with schedule 'ar': remove it or use schedule 'orthrus'",
    ),
    "api key": (
        lambda a: a.update(api={"keys_fil": "x"}),
        "args.api.keys_fil: unknown key, did you mean 'keys_file'?",
    ),
    "limits without keys": (
        lambda a: a.update(api={"tokens_per_minute": 5}),
        "args.api: requests_per_minute and tokens_per_minute are limits of a key, and there are no keys",
    ),
    "two places for keys": (
        lambda a: a.update(api={"keys_file": "x", "keys_env": "X"}),
        "args.api: keys_file and keys_env are two places for the same keys: remove one",
    ),
    "name": (
        lambda a: a["replica"].update(name="mine"),
        "args.replica.name: the application names its deployments",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_args_that_cannot_work_name_path_and_fix(fault: str) -> None:
    change, said = FAULTS[fault]
    args = copy.deepcopy(ARGS)
    change(args)
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_limit_the_size_of_grpc_messages(path: Path) -> None:
    limit = "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"
    options = yaml.safe_load(path.read_text())["controller_options"]
    assert int(options["runtime_env"]["env_vars"][limit]) == 8 << 20


def test_config_check_looks_at_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys.yaml"
    config = copy.deepcopy(TINY)
    config["applications"][0]["args"]["api"] = {"keys_file": str(keys)}
    file = str(written(tmp_path / "serve.yaml", config))
    assert main(["config", "check", file]) == 0
    assert "which is not on this machine" in capsys.readouterr().out
    keys.write_text(new_key("a")[1] + new_key("b", datetime(2020, 1, 1))[1])
    assert main(["config", "check", file]) == 0
    assert f"2 keys in {keys}, 1 of them expired" in capsys.readouterr().out
    keys.write_text("- {name: a}")
    assert main(["config", "check", file]) == 1
    assert f"{keys}:1:3: keys[0].sha256: Field required" in capsys.readouterr().err


def test_all_faults_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    config = copy.deepcopy(TINY)
    config["applications"][0]["args"]["engine"]["dtyp"] = "float32"
    second = copy.deepcopy(config["applications"][0]) | {"name": "second", "route_prefix": "/second"}
    second["deployments"] = [{"name": "Ingress", "num_replicas": 2}]
    config["applications"].append(second)
    file = written(tmp_path / "serve.yaml", config)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = file.read_text().splitlines()
    first, second = (number + 1 for number, line in enumerate(lines) if "dtyp:" in line)
    deployments = lines.index("  deployments:") + 1
    assert str(caught.value).splitlines() == [
        f"{file}:{first}:7: applications[0].args.engine.dtyp: unknown key, did you mean 'dtype'?",
        f"{file}:{deployments}:3: applications[1].deployments: options go under args.replica and args.ingress: move them there",
        f"{file}:{second}:7: applications[1].args.engine.dtyp: unknown key, did you mean 'dtype'?",
    ]


TEXTS: dict[str, tuple[str, str, str]] = {
    "port over the range": (
        "port: 8000",
        "port: 80000",
        "4:3: http_options.port: Input should be less than or equal to 65535",
    ),
    "port under the range": (
        "port: 9000",
        "port: 0",
        "7:3: grpc_options.port: Input should be greater than or equal to 1",
    ),
    "octal port": ("port: 8000", "port: 0755", "4:9: http_options.port: YAML 1.1 reads 0755 as octal"),
    "one port twice": (
        "port: 8000",
        "port: 9000",
        "7:3: grpc_options.port: 9000 is http_options.port too: give HTTP and gRPC a port each",
    ),
    "key twice": (
        "device: cpu",
        "model: x",
        "24:9: applications[0].args.engine.model: comes twice, first in line 23: remove one",
    ),
    "word for a text": (
        "device: cpu",
        "served_model_name: no",
        "24:9: applications[0].args.engine.served_model_name: Input should be a valid string: YAML 1.1 reads no without "
        "quotes as true or false: put it in quotes",
    ),
    "date for a text": (
        "device: cpu",
        "served_model_name: 2026-11-28",
        "24:9: applications[0].args.engine.served_model_name: Input should be a valid string: put 2026-11-28 in quotes",
    ),
    "nothing for a text": (
        "model: models/orthrus-tiny",
        "model:",
        "23:9: applications[0].args.engine.model: Input should be a valid string: it is empty",
    ),
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_fault_has_its_line_and_column(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, said = TEXTS[fault]
    file = tmp_path / "serve.yaml"
    file.write_text((ROOT / "configs" / "tiny-cpu.yaml").read_text().replace(before, after, 1))
    assert main(["config", "check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}:{said}\n" or fault == "octal port"
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}:{said}")


def test_words_that_mean_true_or_false_are_taken_where_that_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        (ROOT / "configs" / "tiny-cpu.yaml").read_text().replace("device: cpu", "prefix_caching: off", 1)
    )
    _, apps = load_config(file)
    assert apps["orthrus"].engine.prefix_caching is False


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("# nothing\n", "is empty"), ("- 1\n", "holds a list"), ("3", "holds a int")],
)
def test_a_file_without_settings_says_so(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"serve\.yaml:1:1: serve\.yaml {said}.*configs/ has examples"):
        load_config(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(http_option={}), "http_option: unknown key, did you mean 'http_options'?"),
        (lambda c: c["http_options"].update(prt=1), "http_options.prt: unknown key, did you mean 'port'?"),
        (
            lambda c: c["applications"][0].update(arg={}),
            "applications[0].arg: unknown key, did you mean 'args'?",
        ),
    ],
)
def test_faults_around_the_args_are_named_too(tmp_path: Path, change: Change, said: str) -> None:
    config = copy.deepcopy(TINY)
    change(config)
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path / "serve.yaml", config))
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize("text", ["- 1", "applications: [", "applications: 3"])
def test_a_file_that_is_no_serve_config_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no directory": ({"model": "/nowhere/model"}, "no directory /nowhere/model"),
    "no such model in a folder of the project": (
        {"model": "models/orthrus-tny"},
        "no directory models/orthrus-tny, and models is a folder here with the models orthrus-tiny: correct the path",
    ),
    "draft over block": ({"draft_length": 512}, "draft_length 512 is over the checkpoint's block_size"),
    "context over positions": (
        {"max_model_len": 1 << 20, "kv_cache_tokens": None},
        "max_model_len 1048576 is over the",
    ),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_model_that_cannot_be_served_fails_before_anything_starts(tmp_path: Path, fault: str) -> None:
    """Serve would start a replica three times over before it gave up."""
    change, said = MODELS[fault]
    config = copy.deepcopy(TINY)
    config["applications"][0]["args"]["engine"] |= change
    file = written(tmp_path / "serve.yaml", config)
    for attempt in (
        lambda: serve_config(file),
        lambda: build(config["applications"][0]["args"]),
        lambda: list(check_config(file, CLUSTER)),
    ):
        with pytest.raises(ConfigError, match=said):
            attempt()


def test_a_broken_checkpoint_fails_before_anything_starts(tmp_path: Path, tiny_orthrus: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_orthrus.iterdir():
        data = file.read_bytes()
        (model / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        build({"engine": {"model": str(model), "device": "cpu"}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda a: a["engine"].update(kv_cache_tokens=100_000),
            "don't fit the 79 GiB of one H100: set max_mo",
        ),
        (
            lambda a: a["engine"].update(model="Qwen/Qwen3-72B"),
            "don't fit the 79 GiB of one H100: take a larger",
        ),
        (
            lambda a: a["replica"]["ray_actor_options"].update(accelerator_type="A100"),
            "args.replica.ray_actor_options: no node type of .* has 4 CPU, 1 GPU, A100",
        ),
        (
            lambda a: a["replica"]["autoscaling_config"].update(min_replicas=33, max_replicas=40),
            "33 replicas at least, and .* has room for 32",
        ),
    ],
)
def test_what_the_cluster_has_no_room_for_is_named(tmp_path: Path, change: Change, said: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / "qwen3-32b-h100.yaml").read_text())
    change(config["applications"][0]["args"])
    with pytest.raises(ConfigError, match=said):
        list(check_config(written(tmp_path / "serve.yaml", config), CLUSTER))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "n-grams of 2 to 4 tokens, looked up in prompt and text (schedule ngram)"),
        ({"prompt_lookup_max": 0}, "none (schedule ar)"),
        (
            {"model": str(ROOT / "models" / "orthrus-tiny")},
            "diffusion blocks of up to 16 rows and n-grams of 2 to",
        ),
        ({"model": str(ROOT / "models" / "orthrus-tiny"), "schedule": "ar"}, "none (schedule ar)"),
    ],
)
def test_the_check_says_where_drafts_come_from(
    tmp_path: Path, tiny_qwen3: Path, settings: dict[str, Any], said: str
) -> None:
    config = copy.deepcopy(TINY)
    config["applications"][0]["args"]["engine"] = {"model": str(tiny_qwen3), "device": "cpu"} | settings
    lines = list(check_config(written(tmp_path / "serve.yaml", config), CLUSTER))
    assert [line for line in lines if line.startswith(f"  drafts    {said}")], lines
