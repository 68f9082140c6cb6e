"""API keys, rate limits and the cache `Recent`, without a server."""

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orthrus.cli import main
from orthrus.deployments.access.call import Call
from orthrus.deployments.access.keys import KeyRing, new_key, parse_keys
from orthrus.deployments.access.rate_limits import Limits, RateLimiter, Standing, duration
from orthrus.deployments.bodies.completion_body import CompletionBody
from orthrus.deployments.config.api import ApiConfig
from orthrus.deployments.operations.recent import Recent
from orthrus.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_concurrent_callers_share_one_call() -> None:
    clock, asked = Clock(), 0

    async def ask() -> int:
        nonlocal asked
        await asyncio.sleep(0)
        asked += 1
        if asked == 3:
            raise ValueError
        return asked

    async def main() -> None:
        recent = Recent(ask, clock)
        assert await asyncio.gather(*(recent() for _ in range(9))) == [1] * 9
        clock.now += 1
        assert await recent() == await recent() == 2
        clock.now += 1
        with pytest.raises(ValueError):  # noqa: PT011
            await recent()
        assert await recent() == 4

    asyncio.run(main())


# --- keys


def test_a_new_key_is_found_by_its_hash_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["keys", "new", "ann", "--expires", "2030-01-02", "--tokens-per-minute", "9"]) == 0
    first = capsys.readouterr()
    assert main(["keys", "new", "bob"]) == 0
    second = capsys.readouterr()
    secret = first.err.split()[-1]
    assert secret.startswith("sk-orthrus-") and secret not in first.out
    assert hashlib.sha256(secret.encode()).hexdigest() in first.out
    file = tmp_path / "keys.yaml"
    file.write_text(first.out + second.out)
    ring = KeyRing(ApiConfig(keys_file=file))
    ann, bob = ring.find(secret), ring.find(second.err.split()[-1])
    assert ann is not None and bob is not None
    assert (ann.name, ann.expires, ann.tokens_per_minute) == ("ann", datetime(2030, 1, 2, tzinfo=UTC), 9)
    assert (bob.name, bob.expires, bob.requests_per_minute) == ("bob", None, None)
    assert ring.find(secret[:-1]) is ring.find("") is ring.find("\ud800") is None


def test_keys_expire() -> None:
    now = datetime.now(UTC)
    ages = [timedelta(hours=1), timedelta(hours=-1)]
    entries = "".join(new_key(f"k{i}", now + age)[1] for i, age in enumerate(ages))
    assert [key.expired for key in parse_keys(entries, "f").values()] == [False, True]
    naive = [now.replace(tzinfo=None) + age for age in ages]
    entries = "".join(new_key(f"k{i}", expires)[1] for i, expires in enumerate(naive))
    assert [key.expired for key in parse_keys(entries, "f").values()] == [False, True]


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "f:1:5: not YAML: "),
        ("keys: 1", "f:1:1: keys: Input should be a valid list"),
        (f"- {{name: a, sha256: '{HASH}', expire: 2020-01-01}}", "f:1:89: keys[0].expire: unknown key, did you mean 'expires'?"),
        ("- {name: a, sha256: 12ab}", "f:1:13: keys[0].sha256: String should match"),
        (f"- {{name: a b, sha256: '{HASH}'}}", "f:1:4: keys[0].name: String should match"),
        (f"- {{name: a, sha256: '{HASH}', tokens_per_minute: 0}}", "f:1:89: keys[0].tokens_per_minute: Input should be"),
        (f"- {{name: a, sha256: '{HASH}'}}\n- {{name: b, sha256: '{HASH}'}}", "two entries have the sha256"),
    ],
)  # fmt: skip
def test_faults_of_a_keys_file_name_place_and_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "f")
    assert said in str(caught.value)


def test_a_changed_file_is_read_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.yaml", Clock()
    old, entry = new_key("old")
    new, other = new_key("new")
    file.write_text(entry)
    ring = KeyRing(ApiConfig(keys_file=file), clock)
    for text, known in ((other, [new]), ("- {", [new]), (entry + other, [old, new]), ("[]", [])):
        file.write_text(text)
        clock.now += 10
        assert [key for key in (old, new) if ring.find(key)] == known
    file.write_text(entry)
    clock.now += 10
    assert ring.find(old) is not None
    file.unlink()
    clock.now += 10
    assert ring.find(old) is not None
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing(ApiConfig(keys_file=file))


def test_keys_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    key, entry = new_key("a")
    config = ApiConfig(keys_env="SOME_KEYS")
    with pytest.raises(ConfigError, match="no environment variable SOME_KEYS"):
        KeyRing(config)
    monkeypatch.setenv("SOME_KEYS", entry)
    assert KeyRing(config).find(key) is not None


# --- limits


def admit(limiter: RateLimiter, limits: Limits, key: str = "k", spent: int = 0) -> Standing:
    return asyncio.run(limiter.admit(key, limits, {key: spent}))


def test_requests_are_admitted_as_often_as_the_limit_says() -> None:
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(requests_per_minute=6)
    assert [admit(limiter, limits).quotas["requests"].remaining for _ in range(6)] == [5, 4, 3, 2, 1, 0]
    refused = admit(limiter, limits)
    assert (refused.exhausted, refused.retry_after) == ("requests", 10.0)
    assert not admit(limiter, limits, key="another").exhausted
    admitted = 0
    for _ in range(600):
        clock.now += 1
        admitted += not admit(limiter, limits).exhausted
    assert admitted == 60


def test_tokens_may_be_overdrawn_and_are_paid_back() -> None:
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(tokens_per_minute=60)
    assert not admit(limiter, limits).exhausted
    refused = admit(limiter, limits, spent=100)
    assert refused.exhausted == "tokens"
    # The bucket is at -40 and one token must be left: 41 seconds at one a second.
    assert refused.retry_after == pytest.approx(41)
    assert refused.quotas["tokens"].remaining == 0 and refused.quotas["tokens"].reset == pytest.approx(100)
    clock.now += 40.5
    assert admit(limiter, limits).exhausted
    clock.now += 0.5
    assert not admit(limiter, limits).exhausted


def test_a_refused_request_takes_nothing_and_a_new_limit_counts_at_once() -> None:
    clock = Clock()
    limiter, limits = RateLimiter(clock), Limits(requests_per_minute=2, tokens_per_minute=60)
    admit(limiter, limits, spent=0)
    for _ in range(5):
        assert admit(limiter, limits, spent=100).exhausted == "tokens"
    clock.now += 600
    assert admit(limiter, limits).quotas["requests"].remaining == 1
    larger = admit(limiter, Limits(requests_per_minute=10))
    assert larger.quotas["requests"].remaining == 9 and "tokens" not in larger.quotas


def test_a_session_of_any_length_has_a_short_name_of_its_own() -> None:
    """The name goes to a replica with each of a call's prompts."""
    given = ["", "s", "😀" * 64, "a" * (1 << 22), "a" * ((1 << 22) - 1) + "b"]
    names = []
    for session in given:
        call = Call("completions")
        call.read(CompletionBody(model="m", prompt="p", prompt_cache_key=session))
        names.append(call.session)
    assert names[:3] == given[:3] and len(set(names)) == len(given)
    assert max(map(len, names)) <= 256


def test_headers_are_openais() -> None:
    standing = admit(RateLimiter(Clock()), Limits(requests_per_minute=60, tokens_per_minute=1000))
    assert standing.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0s",
    }
    assert [duration(s) for s in (0.0001, 1.5, 60, 432.2)] == ["0.001s", "1.5s", "1m0s", "7m12s"]
