"""The report of `orthrus verify`."""

import json
from dataclasses import asdict, dataclass, field

from orthrus.measure.drift import Check, Drift
from orthrus.measure.hugging_face_check import KL_LIMIT, HuggingFaceCheck


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`. `ok`: no drift in any check, and Hugging Face's distributions within limits."""

    model: str
    device: str
    dtype: str
    torch: str
    requests: int
    reference_tokens: int
    compared_tokens: int
    checks: tuple[Check, ...]
    hugging_face: HuggingFaceCheck | None
    drifts: tuple[Drift, ...] = field(default=())
    left_out: tuple[str, ...] = field(default=())
    """Checks that this model or device can't run, and why."""

    @property
    def ok(self) -> bool:
        exact = not any(check.drifted_tokens or check.drifted_logprobs for check in self.checks)
        return exact and (self.hugging_face is None or self.hugging_face.ok)

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def to_text(self) -> str:
        width = max([18, *(len(check.name) + 1 for check in self.checks)])
        lines = [
            f"{self.model} on {self.device}, {self.dtype}, torch {self.torch}: "
            f"{self.requests} request{'s' * (self.requests != 1)}, {self.compared_tokens} tokens compared with "
            f"{self.reference_tokens} of the reference",
            "",
            f"{'check':<{width}}{'drifted':>9}{'logprobs':>10}{'tok/cycle':>11}{'tok/pass':>10}{'tok/s':>8}{'preempted':>11}",
        ]
        lines += [
            f"{c.name:<{width}}{c.drifted_tokens:>9}{c.drifted_logprobs:>10}{c.tokens_per_cycle:>11.2f}"
            f"{c.tokens_per_pass:>10.2f}{c.tokens / max(c.seconds, 1e-9):>8.0f}{c.preemptions:>11}"
            for c in self.checks
        ]
        if (hf := self.hugging_face) is not None:
            limit = f"limit {KL_LIMIT:.0e}" if hf.limited else "no limit in 16 bits"
            lines += [
                "",
                f"Hugging Face, {hf.dtype}, {hf.positions} positions: KL max {hf.max_kl:.1e}, mean {hf.mean_kl:.1e} "
                f"({limit}); logprobs within {hf.max_logprob_gap:.1e}; "
                f"{hf.greedy_disagreements} greedy picks differ",
            ]
        lines += [f"left out: {check}" for check in self.left_out]
        lines += [
            f"DRIFT {d.check} {d.request} at {d.position}: {d.expected} became {d.got}" for d in self.drifts
        ]
        return "\n".join(
            [*lines, "", "zero drift" if self.ok else "DRIFT: the output depends on more than the request"]
        )
