"""Training: what a diffusion row sees, the distillation gradient, resumption, and a base that stays as it was."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from orthrus.errors import ConfigError
from orthrus.models.config import ModelConfig
from orthrus.training.attention import draft_attention
from orthrus.training.base import BaseSettings, train_base
from orthrus.training.batches import TokenStream
from orthrus.training.blocks import draft_blocks, random_anchors, visibility
from orthrus.training.distill import forward_kl
from orthrus.training.distributed import Processes
from orthrus.training.drafts import DraftLoss
from orthrus.training.heads import HeadsSettings, train_heads, two_views
from orthrus.training.model import TwoViewModel, initialise, load_frozen
from orthrus.training.settings import read_settings
from tests.checkpoints import make_checkpoint

BLOCK, MASK, LENGTH = 4, 63, 20
ANCHORS = torch.tensor([[0, 5, 16], [3, 4, 10]])
LENGTHS = torch.tensor([[4, 2, 4], [3, 4, 4]])
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
BASE = BaseSettings(
    steps=6, rows=4, row_length=24, compile=False, log_every=2, eval_every=100, save_every=2, eval_rows=4
)
HEADS = HeadsSettings(
    steps=6, block_size=BLOCK, rows=4, row_length=24, anchors=3, compile=False, log_every=2, save_every=2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3 that has no mask token."""
    return make_checkpoint(
        tmp_path_factory.mktemp("base"), diffusion=False, vocab_size=64, hidden_size=32, heads=4, head_dim=8
    )


def with_heads(base: Path) -> TwoViewModel:
    return load_frozen(base, BLOCK, MASK, torch.device("cpu"))


@pytest.fixture(scope="module")
def stream() -> TokenStream:
    return TokenStream(np.random.default_rng(2).integers(0, 60, 2000), "a random text")


REPEATING = TokenStream(np.arange(2000) % 7, "a repeating text")


def sees(sequence: int, row: int, key: int) -> bool:
    """The rule, spelt out: keys are the AR keys of positions 0..LENGTH - 1, then the diffusion rows."""
    block, offset = divmod(row, BLOCK)
    if key < LENGTH:
        return key < ANCHORS[sequence, block].item()
    other_block, other_offset = divmod(key - LENGTH, BLOCK)
    if other_block != block:
        return False
    return other_offset < LENGTHS[sequence, block].item() or other_offset == offset


def dense_rule() -> Tensor:
    """`sees` as bool [2, rows, LENGTH + rows]."""
    rows = ANCHORS.shape[1] * BLOCK
    return torch.tensor(
        [[[sees(s, row, key) for key in range(LENGTH + rows)] for row in range(rows)] for s in range(2)]
    )


def test_a_row_sees_ar_keys_before_its_anchor_and_the_live_rows_of_its_own_block() -> None:
    rows = torch.randint(0, 60, (2, LENGTH))
    blocks = draft_blocks(rows, ANCHORS, LENGTHS, BLOCK, MASK)
    expected = dense_rule()
    rule = visibility(ANCHORS, LENGTHS, LENGTH, BLOCK)
    index = [torch.arange(n) for n in expected.shape]
    found = rule(index[0][:, None, None], torch.tensor(0), index[1][None, :, None], index[2][None, None, :])
    assert torch.equal(found, expected)
    for sequence in range(2):
        for row in range(ANCHORS.shape[1] * BLOCK):
            block, offset = divmod(row, BLOCK)
            anchor = int(ANCHORS[sequence, block])
            assert blocks.positions[sequence, row] == anchor + offset
            assert blocks.tokens[sequence, row] == (rows[sequence, anchor] if offset == 0 else MASK)
            assert blocks.live[sequence, block, offset] == (offset < LENGTHS[sequence, block])


def attention_inputs() -> list[Tensor]:
    """Queries, AR keys and values, own keys and values: 4 heads over 2, head_dim 16."""
    generator = torch.Generator().manual_seed(0)
    rows = ANCHORS.shape[1] * BLOCK
    shapes = [(2, 4, rows, 16)] + [(2, 2, LENGTH, 16)] * 2 + [(2, 2, rows, 16)] * 2
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def slow_attention(inputs: list[Tensor]) -> Tensor:
    """The rule row by row, key by key."""
    query, keys, values = inputs[0], *(torch.cat([inputs[i], inputs[i + 2]], 2) for i in (1, 2))
    out = torch.zeros_like(query)
    for sequence in range(2):
        for head in range(4):
            for row in range(query.shape[2]):
                seen = [key for key in range(keys.shape[2]) if sees(sequence, row, key)]
                scores = keys[sequence, head // 2, seen] @ query[sequence, head, row] / 4
                out[sequence, head, row] = scores.softmax(0) @ values[sequence, head // 2, seen]
    return out


def test_attention_and_its_gradient_are_those_of_the_rule() -> None:
    inputs = attention_inputs()
    blocks = draft_blocks(torch.zeros(2, LENGTH, dtype=torch.int64), ANCHORS, LENGTHS, BLOCK, MASK)
    found = draft_attention(inputs[0], (inputs[1], inputs[2]), (inputs[3], inputs[4]), blocks)
    expected = slow_attention(inputs)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for gradient, wanted in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_reads_the_rule_as_meant() -> None:
    inputs = [t.detach() for t in attention_inputs()]
    rows = inputs[0].shape[2]
    rule = visibility(ANCHORS, LENGTHS, LENGTH, BLOCK)
    mask = create_block_mask(rule, 2, None, rows, LENGTH + rows, device="cpu")
    keys, values = (torch.cat([inputs[i], inputs[i + 2]], 2) for i in (1, 2))
    found = flex_attention(inputs[0], keys, values, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found, slow_attention(inputs))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_among_others_is_the_block_alone_after_its_prefix(base: Path, recompute: bool) -> None:
    model = with_heads(base)
    rows = torch.randint(0, 60, (2, LENGTH))
    blocks = draft_blocks(rows, ANCHORS, LENGTHS, BLOCK, MASK)
    with torch.no_grad():
        together = model.diffuse(blocks, model(rows)[1], recompute)
        for sequence in range(2):
            for block in range(3):
                anchor, length = int(ANCHORS[sequence, block]), int(LENGTHS[sequence, block])
                prefix = rows[sequence : sequence + 1, : anchor + 1]
                _, cache = model(prefix[:, :-1])
                own = draft_blocks(prefix, torch.tensor([[anchor]]), torch.tensor([[length]]), length, MASK)
                alone = model.diffuse(own, cache)
                torch.testing.assert_close(
                    together[sequence, block * BLOCK :][:length], alone[0], rtol=1e-4, atol=1e-5
                )


def test_anchors_are_distinct_and_leave_room_for_their_block() -> None:
    anchors = random_anchors(50, 5, 12, BLOCK, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 5 for row in anchors.tolist())
    assert anchors.min() == 0
    assert anchors.max() == 12 - BLOCK


@pytest.mark.parametrize("slice_rows", [3, None])
def test_fused_kl_has_the_loss_and_gradient_of_autograd(slice_rows: int | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets, head = torch.randn(7, 20, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    index, weight = torch.randint(0, 7, (11,)), torch.rand(11, dtype=torch.float64)
    student, teacher = (hidden @ head.T).log_softmax(-1), targets[index].log_softmax(-1)
    expected = ((teacher.exp() * (teacher - student)).sum(-1) * weight).sum()
    (gradient,) = torch.autograd.grad(expected * 3, hidden)
    total, _, agree = forward_kl(
        hidden, targets, index, head, lambda kl, agree: weight, slice_rows=slice_rows
    )
    (fused,) = torch.autograd.grad(total * 3, hidden)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused, gradient, rtol=1e-4, atol=1e-5)
    assert agree.tolist() == (student.argmax(-1) == teacher.argmax(-1)).tolist()


class Stopped(Exception):
    pass


class StoppingStream(TokenStream):
    """A stream that fails when row `stop` is read, as if the process had been killed."""

    def __init__(self, stream: TokenStream, stop: int) -> None:
        super().__init__(stream._tokens.numpy(), "a stopping text")
        self._stop = stop

    def rows(self, first: int, count: int, length: int, seed: int) -> Tensor:
        if first + count > self._stop:
            raise Stopped
        return super().rows(first, count, length, seed)


def train(kind: str, base: Path, stream: TokenStream, folder: Path, **changes: Any) -> TwoViewModel:
    """Heads or a base, trained in `folder`."""
    if kind == "base":
        model = TwoViewModel(CONFIG)
        initialise(model, seed=0)
        train_base(model, stream, REPEATING, BASE.model_copy(update=changes), folder, Processes())
    else:
        model = with_heads(base)
        heads = HEADS.model_copy(update=changes | {"short_blocks": 0.5})
        train_heads(model, [(4, stream)], heads, folder, Processes())
    return model


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("base", "adamw"), ("base", "muon"), ("heads", "adamw"), ("heads", "muon")]
)
def test_a_run_stopped_anywhere_and_resumed_gives_the_weights_of_an_unbroken_one(
    base: Path, stream: TokenStream, tmp_path: Path, kind: str, optimizer: str
) -> None:
    changes = {"optimizer": optimizer, "micro_batch": 2}
    whole = train(kind, base, stream, tmp_path / "whole", **changes)
    # Before the first save, in the middle of a step, between saves.
    for stop in (2, 14, random.Random(f"{kind} {optimizer}").randrange(1, 24)):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            train(kind, base, StoppingStream(stream, stop), folder, **changes)
        resumed = train(kind, base, stream, folder, **changes)
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, resumed.state_dict()[name]), (name, stop)
        metrics = [(folder / f"{kind}.jsonl").read_text() for folder in (tmp_path / "whole", folder)]
        steps = [[line.split(",")[0] for line in text.splitlines()] for text in metrics]
        assert steps[0] == steps[1]


def test_a_state_of_another_run_is_refused(base: Path, stream: TokenStream, tmp_path: Path) -> None:
    train("heads", base, stream, tmp_path)
    train("heads", base, stream, tmp_path, steps=7, log_every=3)
    with pytest.raises(
        ConfigError, match=r"heads\.pt was begun with other settings \(lr 0\.0002 there, 0\.1 now"
    ):
        train("heads", base, stream, tmp_path, lr=0.1)


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"recompute": True}])
def test_what_saves_memory_changes_no_more_than_rounding(
    base: Path, stream: TokenStream, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train("heads", base, stream, tmp_path / "whole")
    parts = train("heads", base, stream, tmp_path / "parts", **changes)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, parts.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_head_training_changes_every_diffusion_weight_and_no_other(
    base: Path, stream: TokenStream, tmp_path: Path
) -> None:
    before = with_heads(base).state_dict()
    model = with_heads(base)
    train_heads(model, [(3, stream), (1, REPEATING)], HEADS, tmp_path, Processes())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("_diff." not in name), name
    # A diffusion view starts as the AR view.
    assert all(torch.equal(t, before[n.replace("_diff.", ".")]) for n, t in before.items())


@pytest.mark.parametrize(
    ("miss_decay", "kl_power", "first_weight"),
    [(1.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5, 0.5, 1.0), (0.5, 0.5, 0.2), (1.0, 1.0, 0.0)],
)
def test_a_draft_weighs_less_for_each_wrong_one_before_it(
    base: Path, stream: TokenStream, miss_decay: float, kl_power: float, first_weight: float
) -> None:
    model = with_heads(base)
    rows = stream.rows(0, 2, LENGTH, seed=0)
    changes = {"miss_decay": miss_decay, "kl_power": kl_power, "first_weight": first_weight}
    settings = HEADS.model_copy(update=changes | {"short_blocks": 0.5})
    loss = DraftLoss(model, settings, rows=2, length=LENGTH, seed=0, compiled=False)
    blocks = loss.blocks(0, range(2), rows)
    with torch.no_grad():
        hidden, drafted = two_views(model, rows, blocks, False)
        found = loss(hidden, drafted, blocks)
        targets = model.logits(hidden).log_softmax(-1)
        drafts = model.logits(drafted).log_softmax(-1).view(2, -1, BLOCK, CONFIG.vocab_size)
    expected, count = 0.0, 0
    for sequence in range(2):
        for block, anchor in enumerate(blocks.anchors[sequence].tolist()):
            weight = 1.0
            for row in range(int(blocks.lengths[sequence, block])):
                share = 1.0 if row else first_weight
                target, draft = targets[sequence, anchor + row], drafts[sequence, block, row]
                kl = (target.exp() * (target - draft)).sum().item()
                # The loss is a tangent of kl ** power: of its gradient, at this kl.
                expected += share * weight * kl * kl_power * (kl + 0.01) ** (kl_power - 1)
                count += 1
                if target.argmax() != draft.argmax():
                    weight *= miss_decay**share
    assert found.item() == pytest.approx(expected / count, rel=1e-4)


def test_base_training_lowers_the_loss(base: Path, tmp_path: Path) -> None:
    train("base", base, REPEATING, tmp_path, steps=60, log_every=1)
    lines = (tmp_path / "base.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line]
    assert losses[-1] < 0.5 * losses[0]


def test_an_epoch_reads_every_token_of_the_stream_once_in_an_order_of_its_own() -> None:
    stream = TokenStream(np.arange(107), "numbers")
    assert stream.per_epoch(10) == 9
    epochs = [stream.rows(first, 9, 10, seed=0) for first in (0, 9)]
    for rows in epochs:
        tokens = sorted(rows.flatten().tolist())
        assert tokens == list(range(tokens[0], tokens[0] + 90))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(torch.cat(epochs)[5:13], stream.rows(5, 8, 10, seed=0))
    with pytest.raises(ConfigError, match="too few for rows of 60"):
        stream.rows(0, 1, 60, seed=0)


def test_processes_share_a_step_in_whole_passes() -> None:
    assert Processes().share(8, None) == [range(8)]
    assert [Processes(rank, 2).share(8, 2) for rank in range(2)] == [
        [range(2), range(2, 4)],
        [range(4, 6), range(6, 8)],
    ]
    with pytest.raises(ConfigError, match="8 can't be shared evenly by 3 processes"):
        Processes(0, 3).share(8, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nlearning: 1", "learning: Extra inputs"),
        ("lr: 1.0", "set one of steps, epochs and seconds"),
        ("steps: 1\nanchors: 2000", "2000 anchors with blocks of 32 don't fit a row of 1024"),
        ("steps: many", "steps: Input should be a valid integer"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "heads.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"heads\.yaml: .*{message}"):
        read_settings(HeadsSettings, tmp_path / "heads.yaml")
