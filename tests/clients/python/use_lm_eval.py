"""lm-eval: a multiple-choice task and a text to score, through the API and by transformers on the same checkpoint."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from common import BASE, MODEL, step
from lm_eval.tasks import TaskManager

CHECKPOINT = os.environ["ORTHRUS_CHECKPOINT"]
QUESTIONS = [
    ("def add(a, b):\n    return", [" a + b", " a - b", " None", " [a]"]),
    ("import numpy as", [" np", " pd", " plt", " torch"]),
    ("for i in", [" range(10):", " while:", " def:", " 10:"]),
    ("with open(path) as", [" f:", " with:", " open", " 3:"]),
    ("class Dog(Animal):\n    def", [" __init__(self):", " 7", " return", " import"]),
    ("try:\n    x = int(s)\nexcept", [" ValueError:", " for", " 12", " try"]),
] * 2
TASK = """
task: code_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
PERPLEXITY = """
task: code_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""

with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "questions.jsonl"
    lines = [{"question": q, "choices": c, "answer": 0} for q, c in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, lines)))
    (Path(folder) / "code_choice.yaml").write_text(TASK.format(data=data))
    (Path(folder) / "code_perplexity.yaml").write_text(PERPLEXITY.format(data=data))
    tasks = TaskManager(include_path=folder, include_defaults=False)

    def scores(model: str, arguments: str) -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["code_choice", "code_perplexity"],
            task_manager=tasks,
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )

    with step("transformers"):
        theirs = scores("hf", f"pretrained={CHECKPOINT},dtype=float32")
    api = f"model={MODEL},base_url={BASE}/completions,num_concurrent=2,max_retries=1,max_length=1024"
    for name, tokenizer in (
        (
            "the checkpoint's tokenizer",
            f"tokenizer_backend=huggingface,tokenizer={CHECKPOINT},tokenized_requests=True",
        ),
        ("the server's tokenizer", "tokenizer_backend=remote,tokenized_requests=True"),
    ):
        with step(f"local-completions with {name}"):
            ours = scores("local-completions", f"{api},{tokenizer}")
            for task in ("code_choice", "code_perplexity"):
                for metric, value in theirs["results"][task].items():
                    if isinstance(value, float) and "stderr" not in metric:
                        got = ours["results"][task][metric]
                        assert math.isclose(got, value, rel_tol=1e-4), (task, metric, got, value)
                pairs = zip(theirs["samples"][task], ours["samples"][task], strict=True)
                for their, our in pairs:
                    for one, other in zip(their["resps"], our["resps"], strict=True):
                        expected, got = one[0], other[0]
                        if isinstance(expected, (tuple, list)):
                            assert math.isclose(float(got[0]), float(expected[0]), rel_tol=1e-4, abs_tol=1e-3)
                            assert str(got[1]) == str(expected[1]), (got, expected)
                        else:
                            assert math.isclose(float(got), float(expected), rel_tol=1e-4, abs_tol=1e-3)
