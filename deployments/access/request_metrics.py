"""Latencies and token counts of requests over HTTP and gRPC, as Prometheus metrics by model (listed in docs/operations.md)."""

from ray.serve.metrics import Counter, Histogram

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the arrival of a request to its first token", _SECONDS),
    "inter_token_latency_seconds": (
        "Time between tokens: of each chunk of a choice, the time since the one before, shared among its tokens",
        (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5),
    ),
    "e2e_request_latency_seconds": (
        "From the arrival of a request to its end",
        (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 120, 300, 600),
    ),
    "request_queue_time_seconds": ("Time that a choice waited in an engine's queue", (0.001, *_SECONDS)),
    "request_prompt_tokens": ("Tokens of a request's prompts", _TOKENS),
    "request_generation_tokens": ("Tokens that a request was answered with, all choices together", _TOKENS),
}
COUNTER = "requests"


class RequestMetrics:
    """The metrics `orthrus_*` of the requests for one model that this ingress has served."""

    def __init__(self, model: str) -> None:
        # Serve's metrics add the tags application, deployment and replica themselves.
        self._model = model
        self._histograms = {
            name: Histogram(f"orthrus_{name}", text, boundaries=list(boundaries), tag_keys=("model",))
            for name, (text, boundaries) in HISTOGRAMS.items()
        }
        self._requests = Counter(
            f"orthrus_{COUNTER}",
            "Requests for tokens by their end: ok, cancelled, or the error's name",
            tag_keys=("model", "endpoint", "outcome"),
        )

    def observe(self, name: str, value: float) -> None:
        """Add a value, of seconds or tokens, to a histogram of `HISTOGRAMS`."""
        self._histograms[name].observe(value, {"model": self._model})

    def count(self, endpoint: str, outcome: str) -> None:
        """Count a request that has ended."""
        self._requests.inc(tags={"model": self._model, "endpoint": endpoint, "outcome": outcome})
