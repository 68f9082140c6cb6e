"""Checkpoints in lossless12: written, restored byte for byte, served, and refused where they are damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthrus.cli import main
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.kernels.linear.lossless import pack_lossless, unpack_lossless
from orthrus.kernels.linear.lossless_stored import join_stored, store
from orthrus.kernels.linear.plain import interleave, stack_views
from orthrus.models.families import load_config
from orthrus.requests.request import SamplingParams
from tests.checkpoints import edit_json, make_checkpoint
from tests.conftest import ROOT
from tests.kernels.interpreted import randn

TINY = ROOT / "models" / "orthrus-tiny"


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in path.glob("model*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossless") / "packed"
    assert main(["quantize", str(TINY), str(out), "--format", "lossless12"]) == 0
    return out


def test_a_packed_checkpoint_is_smaller_and_comes_back_byte_for_byte(packed: Path, tmp_path: Path) -> None:
    original, stored = tensors_of(TINY), tensors_of(packed)
    sizes = [sum(t.nbytes for name, t in ts.items() if "_proj" in name) for ts in (stored, original)]
    assert 0.75 < sizes[0] / sizes[1] < 0.77
    config = load_config(packed)
    assert config.quantization is not None and config.quantization.lossless and config.has_diffusion
    assert config.quantization.in_full == ()
    assert main(["quantize", str(packed), str(tmp_path / "full"), "--restore"]) == 0
    restored = tensors_of(tmp_path / "full")
    assert set(restored) == set(original)
    for name, tensor in original.items():
        assert restored[name].dtype == tensor.dtype and torch.equal(restored[name], tensor), name
    assert load_config(tmp_path / "full") == load_config(TINY)


def test_a_packed_checkpoint_gives_the_text_of_the_original(packed: Path) -> None:
    texts, per_cycle = [], []
    for path in (TINY, packed):
        config = EngineConfig(model=str(path), device="cpu", kv_cache_tokens=4096, adaptive_draft=False)
        engine = Engine.from_pretrained(config)
        prompts = [engine.tokenizer.encode(text) for text in ("def main():\n", "import os\n")]
        params = SamplingParams(temperature=0.7, max_tokens=64, seed=1, ignore_eos=True)
        texts.append([[one.token_ids for one in each] for each in engine.generate(prompts, params)])
        per_cycle.append(engine.stats.tokens_per_cycle)
    assert texts[0] == texts[1]
    assert per_cycle[0] == per_cycle[1] and per_cycle[1] > 1.5, per_cycle


def test_weights_that_12_bits_can_not_keep_are_stored_in_full(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=128, intermediate_size=192, head_dim=32
    )
    file, name = path / "model.safetensors", "model.layers.1.self_attn.o_proj_diff.weight"
    tensors = load_file(file)
    tensors[name][5] = 0
    save_file(tensors, file, {"format": "pt"})
    out = tmp_path / "out"
    assert main(["quantize", str(path), str(out), "--format", "lossless12"]) == 0
    how = load_config(out).quantization
    # 192 inputs are no whole number of tiles.
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert how is not None and how.in_full == (*down, name.removesuffix(".weight"))
    assert main(["quantize", str(out), str(tmp_path / "full"), "--restore"]) == 0
    restored = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(restored[key], tensors[key]) for key in tensors if key in restored)


@pytest.mark.parametrize("views", [1, 2])
def test_stored_projections_become_the_layer_that_packing_makes(views: int) -> None:
    full = [
        [{"weight": (randn(64, 256, seed=9 * view + i) * 0.03).bfloat16()} for i in range(3)]
        for view in range(views)
    ]
    full[0][1]["weight"][3, 5:9] = 0
    stored = [[store(projection["weight"]) for projection in view] for view in full]
    made = pack_lossless(stack_views([[dict(p) for p in view] for view in full]))
    joined = join_stored(stored, False)
    for part in ("high", "low", "exceptions", "scales"):
        assert torch.equal(getattr(joined, part), getattr(made, part)), part


def test_a_stored_gate_and_up_are_interleaved() -> None:
    full = [
        {"weight": (randn(128, 256, seed=i) * 0.03).bfloat16(), "bias": randn(128, seed=7 + i)}
        for i in range(2)
    ]
    full[0]["weight"][3, 5:9], full[1]["weight"][70, 40:60] = 0, 0
    stored = [store(p["weight"]) | {"bias": p["bias"]} for p in full]
    made, joined = pack_lossless(interleave([dict(p) for p in full])), join_stored([stored], True)
    assert joined.interleaved and joined.bias is not None and made.bias is not None
    assert torch.equal(joined.bias, made.bias)
    for part in ("high", "low", "exceptions", "scales"):
        assert torch.equal(getattr(joined, part), getattr(made, part)), part


def test_damaged_tensors_write_nowhere_and_are_refused() -> None:
    weight = (randn(64, 256) * 0.03).bfloat16()
    parts = store(weight)
    wild = dict(parts, weight_exceptions=torch.full_like(parts["weight_exceptions"], 0x7FFFFFFF))
    lists = join_stored([[wild]], False).exceptions
    assert int((lists[..., 1:-1] & 0xFFFF).max()) < 64 * 128
    with pytest.raises(ValueError, match="powers of two"):
        join_stored([[dict(parts, weight_scales=parts["weight_scales"] * 3)]], False)
    assert torch.equal(unpack_lossless(join_stored([[parts]], False)).weights[0], weight)


def test_what_does_not_go_together_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="--restore"):
        EngineConfig(model="m", weights="bf16").check_model(load_config(packed))
    assert main(["quantize", str(TINY), str(tmp_path / "a"), "--restore"]) == 2
    assert "is not stored in lossless12" in capsys.readouterr().err
    wide = make_checkpoint(tmp_path / "wide")
    assert main(["quantize", str(wide), str(tmp_path / "b"), "--format", "lossless12"]) == 2
    assert "is saved in float32" in capsys.readouterr().err
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text((packed / "config.json").read_text())
    edit_json(newer / "config.json", quantization_config=settings | {"version": 2})
    with pytest.raises(ConfigError, match="version 2"):
        load_config(newer)
