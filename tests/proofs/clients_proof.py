"""The clients that people use, unchanged, against a running server: `make test-clients`.

Each client has a script under tests/clients/ and an environment of its own under .cache/clients/, made when it is first
needed. Two models are served: the embedded one, and a random one with Qwen3's tokenizer and chat template. Node and npm
are needed besides Python.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import yaml
from ray import serve

from orthrus.deployments.launch.environment import free_port
from orthrus.deployments.launch.serve import serve_config
from tests.checkpoints import edit_json, make_checkpoint
from tests.conftest import ROOT
from tests.qwen3_tokenizer import FILES, fetch

SCRIPTS = ROOT / "tests" / "clients"
ENVIRONMENTS = ROOT / ".cache" / "clients"
# Besides Qwen3's two end tokens, 1 token in 50. Otherwise a random model would hardly end an answer.
ENDS = [151645, 151643, *range(100_000, 103_000)]
# Nor would it end its reasoning, so it has none unless it is asked for.
NO_THINKING = "{%- set enable_thinking = enable_thinking is defined and enable_thinking %}"
INSTALL_SECONDS, RUN_SECONDS = 1200, 420
# Codex' instructions alone are longer than the embedded model's context.
ONLY_WITH = {"codex": "qwen3"}


@dataclass(frozen=True)
class Served:
    """A model that is served: `url` without `/v1`, and the folder with its checkpoint."""

    name: str
    url: str
    checkpoint: Path


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """One Serve instance with an application for each model, told apart by their paths."""
    folder = tmp_path_factory.mktemp("clients")
    qwen3 = _qwen3_checkpoint(folder / "qwen3-random")
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    web, rpc = free_port(), free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": web}
    config["grpc_options"]["port"] = rpc
    [tiny] = config["applications"]
    del tiny["args"]["replica"]["autoscaling_config"]
    tiny["args"]["engine"]["adaptive_draft"] = False
    other = yaml.safe_load(yaml.safe_dump(tiny)) | {"name": "qwen3", "route_prefix": "/qwen3"}
    other["args"]["engine"] |= {"model": str(qwen3), "kv_cache_tokens": 65536}
    config["applications"].append(other)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{web}"
    try:
        serve_config(file)
        yield {
            "tiny": Served("orthrus-tiny", url, ROOT / "models" / "orthrus-tiny"),
            "qwen3": Served(qwen3.name, f"{url}/qwen3", qwen3),
        }
    finally:
        serve.shutdown()
        ray.shutdown()


def _qwen3_checkpoint(path: Path) -> Path:
    """A small random model with Qwen3's own tokenizer, special tokens and chat template."""
    make_checkpoint(path, vocab_size=151936, max_position_embeddings=32768, eos_token_id=ENDS, block_size=8)
    edit_json(path / "config.json", mask_token_id=151669)
    for file in FILES:
        name = Path(file).name
        shutil.copy(fetch() / name, path / name)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    edit_json(path / "tokenizer_config.json", chat_template=NO_THINKING + settings["chat_template"])
    return path


def _cases(clients: Iterable[str]) -> list[tuple[str, str]]:
    """Clients and servers: every client with both, but for `ONLY_WITH`."""
    return [
        (client, server)
        for client in sorted(clients)
        for server in ("tiny", "qwen3")
        if ONLY_WITH.get(client, server) == server
    ]


@pytest.mark.parametrize(
    ("client", "server"), _cases(path.stem for path in (SCRIPTS / "python").glob("*.txt"))
)
def test_python(servers: dict[str, Served], client: str, server: str) -> None:
    python = _python_environment(SCRIPTS / "python" / f"{client}.txt")
    _run([str(python), str(SCRIPTS / "python" / f"use_{client.replace('-', '_')}.py")], servers[server])


@pytest.mark.parametrize(
    ("client", "server"), _cases(path.parent.name for path in (SCRIPTS / "node").glob("*/package.json"))
)
def test_node(servers: dict[str, Served], client: str, server: str) -> None:
    folder = _node_environment(SCRIPTS / "node" / client)
    _run(["node", str(folder / "use.mjs")], servers[server], folder)


def _run(command: list[str], served: Served, folder: Path | None = None) -> None:
    """Run a client's script; what it says is shown if it fails."""
    environment = {
        **os.environ,
        "ORTHRUS_URL": served.url,
        "ORTHRUS_MODEL": served.name,
        "ORTHRUS_CHECKPOINT": str(served.checkpoint),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("PYTHONPATH", None)  # The client's packages only.
    done = subprocess.run(
        command, env=environment, cwd=folder, text=True, capture_output=True, timeout=RUN_SECONDS, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"


def _python_environment(requirements: Path) -> Path:
    """The interpreter of an environment with the packages that `requirements` pins."""
    folder = ENVIRONMENTS / f"{requirements.stem}-{_digest(requirements)}"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {requirements.stem} into {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(requirements)], check=True, timeout=INSTALL_SECONDS)
        (folder / "installed").touch()
    return python


def _node_environment(source: Path) -> Path:
    """A folder with a client's script and the packages that its package.json pins."""
    if missing := [tool for tool in ("node", "npm") if shutil.which(tool) is None]:
        pytest.fail(f"{' and '.join(missing)} not found: install Node.js 20 or newer")
    nodes = ENVIRONMENTS / "node"
    folder = nodes / f"{source.name}-{_digest(source / 'package.json')}"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {source.name} into {folder.relative_to(ROOT)}", flush=True)
        folder.mkdir(parents=True)
        shutil.copy(source / "package.json", folder)
        install = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(install, cwd=folder, check=True, timeout=INSTALL_SECONDS)
        (folder / "installed").touch()
    shutil.copy(source / "use.mjs", folder)
    shutil.copy(SCRIPTS / "node" / "common.mjs", nodes)
    return folder


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
