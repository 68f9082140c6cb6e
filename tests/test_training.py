"""Training: what a diffusion row sees, the distillation gradient, resumption, and a base that stays as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orthrus.config import ModelConfig
from orthrus.errors import ConfigError
from orthrus.training.base import BaseConfig, train_base
from orthrus.training.batches import TokenRows, TokenStream
from orthrus.training.blocks import draft_blocks, random_anchors
from orthrus.training.corpus import CorpusConfig, NearDuplicates, chat_documents, is_permissive
from orthrus.training.data import sample
from orthrus.training.distill import forward_kl
from orthrus.training.eval import count_cycles, evaluate
from orthrus.training.heads import HeadsConfig, train_heads
from orthrus.training.model import TwoViewModel, add_diffusion_view, initialise
from orthrus.training.settings import section

BLOCK, MASK = 4, 63
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
BASE = BaseConfig(
    steps=6, rows=4, row_length=24, compile=False, log_every=100, eval_every=100, save_every=3, eval_rows=4
)
HEADS = HeadsConfig(
    steps=6, block_size=BLOCK, rows=4, row_length=24, anchors=3, compile=False, log_every=100, save_every=3
)


@pytest.fixture
def base() -> TwoViewModel:
    model = TwoViewModel(CONFIG)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture
def stream() -> TokenStream:
    return TokenStream(torch.randint(0, 60, (2000,), generator=torch.Generator().manual_seed(2)))


def test_a_row_sees_ar_keys_before_its_anchor_and_the_live_rows_of_its_own_block() -> None:
    rows = torch.randint(0, 60, (2, 20))
    anchors = torch.tensor([[0, 5, 16], [3, 4, 10]])
    lengths = torch.tensor([[4, 2, 4], [3, 4, 4]])
    blocks = draft_blocks(rows, anchors, lengths, BLOCK, MASK)
    for sequence in range(2):
        for block in range(3):
            anchor, length = int(anchors[sequence, block]), int(lengths[sequence, block])
            for offset in range(BLOCK):
                row = block * BLOCK + offset
                seen = set(blocks.mask[sequence, 0, row].nonzero().flatten().tolist())
                own = {
                    20 + block * BLOCK + other for other in range(BLOCK) if other < length or other == offset
                }
                assert seen == set(range(anchor)) | own
                assert blocks.positions[sequence, row] == anchor + offset
                assert blocks.tokens[sequence, row] == (rows[sequence, anchor] if offset == 0 else MASK)
                assert blocks.live[sequence, row] == (offset < length)


def test_a_block_among_others_is_the_block_alone_after_its_prefix(base: TwoViewModel) -> None:
    model = add_diffusion_view(base, BLOCK, MASK)
    rows = torch.randint(0, 60, (2, 20))
    anchors, lengths = torch.tensor([[2, 5, 16], [3, 4, 10]]), torch.tensor([[4, 2, 4], [3, 4, 4]])
    blocks = draft_blocks(rows, anchors, lengths, BLOCK, MASK)
    with torch.no_grad():
        together = model.diffuse(blocks.tokens, blocks.positions, model(rows)[1], blocks.mask)
        for sequence in range(2):
            for block in range(3):
                anchor, length = int(anchors[sequence, block]), int(lengths[sequence, block])
                tokens = torch.tensor([[int(rows[sequence, anchor])] + [MASK] * (length - 1)])
                _, cache = model(rows[sequence : sequence + 1, :anchor])
                mask = torch.ones(1, 1, length, anchor + length, dtype=torch.bool)
                alone = model.diffuse(tokens, torch.arange(anchor, anchor + length)[None], cache, mask)
                torch.testing.assert_close(
                    together[sequence, block * BLOCK :][:length], alone[0], rtol=1e-4, atol=1e-5
                )


def test_anchors_are_distinct_and_leave_room_for_their_block() -> None:
    anchors = random_anchors(50, 5, 12, BLOCK, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 5 for row in anchors.tolist())
    assert anchors.min() == 0
    assert anchors.max() == 12 - BLOCK


@pytest.mark.parametrize("slice_rows", [3, 100])
def test_fused_kl_has_the_loss_and_gradient_of_autograd(slice_rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets, head = torch.randn(7, 20, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    index, weight = torch.randint(0, 7, (11,)), torch.rand(11, dtype=torch.float64)
    student, teacher = (hidden @ head.T).log_softmax(-1), targets[index].log_softmax(-1)
    expected = ((teacher.exp() * (teacher - student)).sum(-1) * weight).sum()
    (gradient,) = torch.autograd.grad(expected * 3, hidden)
    total, _, agree = forward_kl(hidden, targets, index, head, weight, slice_rows=slice_rows)
    (fused,) = torch.autograd.grad(total * 3, hidden)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused, gradient, rtol=1e-4, atol=1e-5)
    assert agree.tolist() == (student.argmax(-1) == teacher.argmax(-1)).tolist()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(
    base: TwoViewModel, stream: TokenStream, tmp_path: Path, optimizer: str
) -> None:
    config = replace(HEADS, optimizer=optimizer, short_blocks=0.5, accumulate=2)
    whole = train_heads(add_diffusion_view(base, BLOCK, MASK), [(1.0, stream)], config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    class Interrupted:
        def rows(self, count: int, length: int, seed: int, step: int) -> torch.Tensor:
            if step >= 8:
                raise Stopped
            return stream.rows(count, length, seed, step)

    with pytest.raises(Stopped):
        train_heads(
            add_diffusion_view(base, BLOCK, MASK), [(1.0, Interrupted())], config, tmp_path / "broken"
        )
    resumed = train_heads(add_diffusion_view(base, BLOCK, MASK), [(1.0, stream)], config, tmp_path / "broken")
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.state_dict()[name]), name


def test_head_training_changes_every_diffusion_weight_and_no_other(
    base: TwoViewModel, stream: TokenStream, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    samples = TokenRows(torch.randint(0, 60, (5, 24)))
    model = train_heads(
        add_diffusion_view(base, BLOCK, MASK), [(0.5, stream), (0.5, samples)], HEADS, tmp_path
    )
    for name, tensor in model.state_dict().items():
        start = before[name.replace("_diff.", ".")]
        assert torch.equal(tensor, start) == ("_diff." not in name), name


def test_base_training_lowers_the_loss_and_resumes(base: TwoViewModel, tmp_path: Path) -> None:
    repeating = TokenStream(torch.arange(2000) % 7)
    model = train_base(base, repeating, repeating, replace(BASE, steps=60, log_every=1), tmp_path)
    lines = (tmp_path / "base.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line]
    assert losses[-1] < 0.5 * losses[0]
    again = train_base(TwoViewModel(CONFIG), repeating, repeating, replace(BASE, steps=60), tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.state_dict()[name]), name


def test_the_sampler_writes_what_the_model_picks_token_by_token(base: TwoViewModel) -> None:
    prompts = torch.randint(0, 60, (3, 5))
    text = sample(base, prompts, 16, temperature=0.0, seed=0)
    with torch.no_grad():
        assert torch.equal(text[:, 5:], base.logits(base(text)[0]).argmax(-1)[:, 4:-1])
    warm = sample(base, prompts, 16, temperature=1.0, seed=0)
    assert torch.equal(warm, sample(base, prompts, 16, temperature=1.0, seed=0))
    assert not torch.equal(warm, sample(base, prompts, 16, temperature=1.0, seed=1))


def test_cycles_count_accepted_drafts_and_the_bonus_token() -> None:
    text = [9, 1, 2, 3, 4, 5]
    drafts = [[1, 2, 0], [0, 0, 0], [0, 0, 0], [4, 5, 0], [0, 0, 0], [0, 0, 0]]
    assert count_cycles(text, drafts, 0) == 2
    assert count_cycles(text, [[0, 0, 0]] * 6, 0) == 5


def test_heads_that_learnt_a_repeating_text_draft_several_tokens(base: TwoViewModel, tmp_path: Path) -> None:
    repeating = TokenStream(torch.arange(2000) % 7)
    train_base(base, repeating, repeating, replace(BASE, steps=80), tmp_path)
    model = add_diffusion_view(base, BLOCK, MASK)
    config = replace(HEADS, steps=150, lr=5e-3)
    train_heads(model, [(1.0, repeating)], config, tmp_path)
    prompts = repeating.even_rows(4, 8)
    for temperature in (0.0, 0.7):
        reports, _ = evaluate(model, prompts, new_tokens=16, temperature=temperature, block_rows=[BLOCK])
        assert reports[0].tokens_per_cycle > 2.5


def test_near_duplicates_and_foreign_licences_stay_out() -> None:
    duplicates = NearDuplicates(min_new=0.5)
    text = "\n".join(f"a line of code number {i} that is long" for i in range(10))
    assert duplicates.keep(text)
    assert not duplicates.keep(text + "\none more line of code that is long")
    assert is_permissive("License-Expression: Apache-2.0")
    assert not is_permissive("License: LGPL-2.1")
    assert not is_permissive("")
    with pytest.raises(ConfigError, match="no pinned version"):
        CorpusConfig(packages=["flask"])


def test_chat_documents_hold_a_question_and_its_function() -> None:
    import random

    body = '        """Add x to the whole of this."""\n        y = x\n        y += 1\n        return y\n'
    source = f"class A:\n    def add(self, x):\n{body}"
    (document,) = chat_documents(source, random.Random(0))
    question, answer = document.split("<|im_end|>\n<|im_start|>assistant\n")
    assert question.startswith("<|im_start|>user\n")
    assert answer.endswith("<|im_end|>\n")
    assert "add" in document


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="heads: unknown setting learning"):
        section(HeadsConfig, {"learning": 1}, "heads")
