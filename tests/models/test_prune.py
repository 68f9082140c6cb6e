"""Pruned copies of a checkpoint."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from orthrus.errors import ConfigError
from orthrus.models.prune import keep_two_of_four, prune_checkpoint
from tests.checkpoints import make_checkpoint
from tests.models.checkpoint_files import load
from tests.quantised import FP8, make_quantised


def test_the_two_largest_of_four_are_kept() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5, 0.5, -0.5, 0.25]])
    expected = torch.tensor([[0.0, -4.0, 0.0, 3.0, 0.5, 0.5, 0.0, 0.0]])
    assert torch.equal(keep_two_of_four(weight), expected)


def test_weights_of_large_inputs_are_kept_by_wanda() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    found = keep_two_of_four(weight, torch.tensor([10.0, 0.1, 1.0, 1.0]))
    assert torch.equal(found, torch.tensor([[1.0, 0.0, 0.0, 3.0], [1.0, 0.0, 1.0, 0.0]]))


def best_two_of_four(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """weight [outs, ins] with, of each four inputs, the two that take the least from the outputs' squares set to zero.

    inputs [ins]: the 2-norms of the inputs. Of the six pairs that may be kept, the one whose weights times inputs have the
    largest sum of squares: what Wanda's scores find, without them.
    """
    outs, ins = weight.shape
    groups, sizes = weight.view(outs, ins // 4, 4), inputs.view(ins // 4, 4)
    pairs = list(itertools.combinations(range(4), 2))
    kept = [((groups * sizes).square()[..., list(pair)]).sum(-1) for pair in pairs]
    best = torch.stack(kept, -1).argmax(-1)
    masks = torch.tensor([[place in pair for place in range(4)] for pair in pairs])
    return (groups * masks[best]).view(outs, ins)


@torch.no_grad()
def prune_in_float64(path: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, pruned layer after layer behind Hugging Face's forward of the AR view."""
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        squares = {linear: torch.zeros(linear.in_features, dtype=torch.float64) for linear in linears}

        def count(
            linear: torch.nn.Module, inputs: tuple[torch.Tensor], _: object, into: Any = squares
        ) -> None:
            into[linear] += inputs[0].flatten(0, -2).square().sum(0)

        hooks = [linear.register_forward_hook(count) for linear in linears]
        for row in rows:
            model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        for linear in linears:
            linear.weight.copy_(best_two_of_four(linear.weight, squares[linear].sqrt()))
    weights: dict[str, torch.Tensor] = model.state_dict()
    return weights


def test_wanda_reads_the_inputs_of_each_layer_behind_pruned_ones(tmp_path: Path) -> None:
    """Those of the AR view alone, over all tokens of all rows."""
    path = make_checkpoint(tmp_path / "model", intermediate_size=96)
    rng = random.Random(0)
    rows = [[rng.randrange(120) for _ in range(length)] for length in (37, 20)]
    prune_checkpoint(path, tmp_path / "pruned", rows)
    before, found, expected = load(path)[1], load(tmp_path / "pruned")[1], prune_in_float64(path, rows)
    names = [name for name in expected if name.endswith("_proj.weight")]
    assert len(names) == 14
    same = sum(int(torch.equal(found[name] == 0, expected[name] == 0)) for name in names)
    # A score that is nearly another's may fall either way.
    assert same >= len(names) - 1
    for name in names:
        assert ((found[name] == 0) != (expected[name] == 0)).float().mean() < 0.001, name
        assert torch.equal(found[name][found[name] != 0], before[name][found[name] != 0])
        assert not torch.equal(found[name], keep_two_of_four(before[name])), "as by magnitude"


def test_a_pruned_copy_differs_in_the_projections_of_the_ar_view_alone(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    prune_checkpoint(path, tmp_path / "pruned")
    config, before = load(path)
    again, after = load(tmp_path / "pruned")
    assert again == config
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")} and changed
    for name in changed:
        zeros = (after[name] == 0).view(-1, 4).sum(1)
        assert bool((zeros == 2).all()), name


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    quantised = make_quantised(tmp_path / "fp8", FP8)
    with pytest.raises(ConfigError, match="is quantised"):
        prune_checkpoint(quantised, tmp_path / "out")
    path = make_checkpoint(tmp_path / "model", intermediate_size=66)
    with pytest.raises(ConfigError, match=r"down_proj.*66 inputs, which 4 must divide"):
        prune_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prune_checkpoint(make_checkpoint(tmp_path / "good"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        prune_checkpoint(tmp_path / "good", tmp_path / "out")
