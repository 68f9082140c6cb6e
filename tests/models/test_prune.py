"""Pruned copies of a checkpoint."""

import random
from pathlib import Path

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


def test_wanda_reads_the_inputs_of_each_layer_behind_pruned_ones(tmp_path: Path) -> None:
    """Against Hugging Face's forward with hooks, layer after layer."""
    path = make_checkpoint(tmp_path / "model", intermediate_size=96)
    rng = random.Random(0)
    rows = [[rng.randrange(120) for _ in range(length)] for length in (37, 20)]
    prune_checkpoint(path, tmp_path / "pruned", rows)
    found = load(tmp_path / "pruned")[1]
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for layer in model.model.layers:
        norms: dict[torch.nn.Module, torch.Tensor] = {}
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        hooks = [
            linear.register_forward_hook(
                lambda module, inputs, _, norms=norms: norms.__setitem__(
                    module, norms.get(module, 0) + inputs[0].flatten(0, -2).square().sum(0)
                )
            )
            for linear in linears
        ]
        with torch.no_grad():
            for row in rows:
                model(torch.tensor([row]))
            for linear in linears:
                linear.weight.copy_(keep_two_of_four(linear.weight, norms[linear].sqrt()))
        for hook in hooks:
            hook.remove()
    expected = model.state_dict()
    names = [name for name in expected if name.endswith("_proj.weight")]
    same = sum(int(torch.equal(found[name] == 0, expected[name] == 0)) for name in names)
    # A score that is nearly another's may fall either way.
    assert same >= len(names) - 1
    for name in names:
        assert ((found[name] == 0) != (expected[name] == 0)).float().mean() < 0.001, name
        assert torch.equal(found[name][found[name] != 0], load(path)[1][name][found[name] != 0])
    magnitude = {name: keep_two_of_four(tensor) for name, tensor in load(path)[1].items() if name in names}
    assert all(not torch.equal(found[name], magnitude[name]) for name in names)


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
