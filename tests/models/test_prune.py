"""Pruned copies of a checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orthrus.errors import ConfigError
from orthrus.models.prune import keep_two_of_four, prune_checkpoint
from tests.checkpoints import make_checkpoint
from tests.models.checkpoint_files import load
from tests.quantised import FP8, make_quantised


def test_the_two_largest_of_four_are_kept() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5, 0.5, -0.5, 0.25]])
    expected = torch.tensor([[0.0, -4.0, 0.0, 3.0, 0.5, 0.5, 0.0, 0.0]])
    assert torch.equal(keep_two_of_four(weight), expected)


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
