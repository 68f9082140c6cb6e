"""The report of `orthrus compare`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orthrus.measure.contest import Ratio
from orthrus.measure.plots import load_pyplot


@dataclass(frozen=True)
class Speed:
    """A method's speed at one batch size."""

    batch: int
    tokens_per_second: float
    """Tokens of all requests together, in the median round. The time includes their prompts."""
    over_ar: Ratio
    tokens_per_cycle: float


@dataclass(frozen=True)
class Drift:
    """What a method changes in the output. The reference is AR decoding with the checkpoint as it is."""

    exact: bool
    """Whether no logit of the text and no token of the answers differs."""
    perplexity: float
    """Perplexity of the text: lower is better."""
    mean_kl: float
    """KL divergence from the reference, in nats, on average over the text's positions."""
    max_kl: float
    """KL divergence at the worst position, in nats."""
    top_1_agreement: float
    """Share of the text's positions at which both find the same token most likely."""
    equal_answers: int
    """Greedy answers that equal the reference's, to the last token."""
    equal_tokens_by_position: tuple[float, ...]
    """For each position of an answer, the share of answers whose token there is the reference's."""
    still_equal_by_position: tuple[float, ...]
    """For each position, the share of answers that equal the reference's up to and with this token."""


@dataclass(frozen=True)
class MethodReport:
    """All figures of one method."""

    name: str
    setup: str
    """What has to be done before the first token."""
    weight_ratio: float
    """Bytes of its weights on a GPU, over those of AR decoding in 16 bits; copies for drafts are not counted."""
    speeds: tuple[Speed, ...]
    drift: Drift


@dataclass(frozen=True)
class CompareReport:
    """All methods, and what they were measured on."""

    model: str
    device: str
    dtype: str
    hardware: str
    torch: str
    text_tokens: int
    """Tokens of the text that was read."""
    answers: int
    """Answers of each method."""
    answer_tokens: int
    """Tokens of each answer."""
    methods: tuple[MethodReport, ...]
    """AR decoding first."""
    left_out: tuple[str, ...]
    """Methods that don't work with this checkpoint or had no room, each with the reason."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        lines = [
            f"{self.model}, {self.dtype}, {self.hardware}, torch {self.torch}",
            "",
            f"{'speed':<10}{'batch':>6}{'tok/s':>10}{'over ar':>20}{'tok/cycle':>11}",
        ]
        for method in self.methods:
            for speed in method.speeds:
                lines.append(
                    f"{method.name:<10}{speed.batch:>6}{speed.tokens_per_second:>10.1f}{speed.over_ar!s:>20}"
                    f"{speed.tokens_per_cycle:>11.2f}"
                )
        lines += [
            "",
            f"drift against ar, on {self.text_tokens:,} tokens of text and {self.answers} greedy answers of "
            f"{self.answer_tokens} tokens",
            f"{'':<10}{'perplexity':>11}{'mean KL':>10}{'worst KL':>10}{'top 1':>9}{'equal answers':>15}{'weights':>9}",
        ]
        for method in self.methods:
            drift = method.drift
            answers = f"{drift.equal_answers} of {self.answers}"
            lines.append(
                f"{method.name:<10}{drift.perplexity:>11.4f}{drift.mean_kl:>10.2g}{drift.max_kl:>10.2g}"
                f"{drift.top_1_agreement:>9.2%}{answers:>15}{method.weight_ratio:>8.2f}x"
            )
        lines += ["", "what it takes"]
        lines += [f"{method.name:<10}{method.setup}" for method in self.methods]
        lines += [f"left out: {line}" for line in self.left_out]
        if self.device == "cpu":
            lines += ["", "a CPU decodes fp8 and int8 with dequantised weights: a GPU has other speeds"]
        exact = ", ".join(method.name for method in self.methods[1:] if method.drift.exact) or "none"
        return "\n".join([*lines, "", f"methods with no difference on this text and these answers: {exact}"])


def plot(report: CompareReport, file: Path) -> None:
    """Draw speed and drift side by side. Raises ConfigError: see `check_plot`."""
    pyplot = load_pyplot()

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for method in report.methods:
        left.plot(
            [str(speed.batch) for speed in method.speeds],
            [speed.over_ar.median for speed in method.speeds],
            marker="o",
            label=method.name,
        )
        right.plot(method.drift.still_equal_by_position, label=method.name)
    left.set_xlabel("requests")
    left.set_ylabel("speed over ar")
    right.set_xlabel("token of the answer")
    right.set_ylabel("share of answers that still equal ar's")
    right.set_ylim(0, 1.02)
    left.legend()
    figure.suptitle(f"{report.model}, {report.hardware}")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
