"""What must start fast imports no torch, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Run in a fresh interpreter.
STARTS = {
    "the ingress": "import orthrus.deployments.ingress.ingress",
    "the router and the policy": "import orthrus.deployments.router, orthrus.deployments.autoscaling",
    "the other deployments": "import orthrus.deployments.access.rate_limits, orthrus.deployments.responses.store",
    "a look at a model": (
        "from orthrus.models.families import load_config\n"
        "from orthrus.models.files import check_files\n"
        "check_files('models/orthrus-tiny', load_config('models/orthrus-tiny'))"
    ),
    "orthrus config check": "from orthrus.cli import main\nmain(['config', 'check', 'configs/tiny-cpu.yaml'])",
}


@pytest.mark.parametrize("start", STARTS)
def test_no_torch(start: str) -> None:
    code = f"import sys\n{STARTS[start]}\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "[]"
