"""guidellm: a benchmark of a few requests runs to its end, without a failed request."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import MODEL, URL, step

with tempfile.TemporaryDirectory() as folder, step("a run"):
    report = Path(folder) / "report.json"
    command = [
        str(Path(sys.executable).parent / "guidellm"), "run",
        "--backend", f"kind=openai_http,target={URL},model={MODEL}",
        "--tokenizer", f"kind=hf_auto,model={os.environ['ORTHRUS_CHECKPOINT']}",
        "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "--profile", "kind=concurrent,streams=2",
        "--constraint", "kind=max_requests,count=8",
        "--output", f"kind=json,path={report}",
        "--disable-console-interactive",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=240)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] >= 8 and not totals["errored"], totals
