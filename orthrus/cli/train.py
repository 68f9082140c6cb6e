"""`orthrus train`: the stages of a training run, each driven by one YAML file.

The stages base, data, heads and medusa also run under torchrun: torchrun --nproc-per-node 8 -m orthrus.cli train heads CONFIG.
"""

import argparse
from pathlib import Path

from orthrus.cli.options import Commands

STAGES = {
    "corpus": "fetch the packages and write the corpus",
    "tokenizer": "train the tokenizer on the corpus",
    "base": "pre-train the base model",
    "data": "let the model write its own training texts",
    "heads": "train the diffusion view of a frozen model",
    "medusa": "train Medusa heads for a frozen model, to compare with",
    "eval": "held-out loss, agreement by depth, tokens per cycle, through the engine",
    "plot": "draw the curves of the stages so far",
}


def add_parser(commands: Commands) -> None:
    """Add `train` and its stages to the command line."""
    parser = commands.add_parser("train", help="train diffusion heads for a frozen Qwen3")
    stages = parser.add_subparsers(title="stages", metavar="STAGE", required=True)
    for stage, text in STAGES.items():
        command = stages.add_parser(stage, help=text)
        command.add_argument("config", type=Path, help="the run's YAML file, such as configs/train/tiny.yaml")
        command.add_argument("--work", type=Path, help="instead of the file's `work`")
        command.add_argument("--out", type=Path, help="instead of the file's `out`")
        if stage == "eval":
            command.add_argument(
                "--profile",
                type=Path,
                help="write how often drafts are right here, for `orthrus bench shape`",
            )
        command.set_defaults(run=run, stage=stage)


def run(arguments: argparse.Namespace) -> None:
    """Run one stage."""
    from orthrus.training.run import Run
    from orthrus.training.settings import read_settings
    from orthrus.training.stages import run_stage

    settings = read_settings(Run, arguments.config, work=arguments.work, out=arguments.out)
    if getattr(arguments, "profile", None) is not None:
        evaluated = settings.eval.model_copy(update={"profile": arguments.profile})
        settings = settings.model_copy(update={"eval": evaluated})
    run_stage(arguments.stage, settings)
