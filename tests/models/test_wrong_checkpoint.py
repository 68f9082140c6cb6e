"""Checkpoints with wrong weights and broken files: each error names what is wrong."""

import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json, make_checkpoint
from tests.models.checkpoint_files import load_error, rewrite, sharded

Q_DIFF = "model.layers.1.self_attn.q_proj_diff.weight"


class TestWrongWeights:
    """One error that names the file, the tensor, what was expected and what was found."""

    def test_missing_tensor(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        rewrite(path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
        message = load_error(path)
        assert str(path) in message
        assert "tensor model.layers.0.mlp.up_proj.weight: expected shape [128, 64], found none" in message

    def test_misshapen_tensor(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        rewrite(path, lambda tensors: tensors.update({Q_DIFF: torch.zeros(64, 60)}))
        assert f"model.safetensors: tensor {Q_DIFF}: expected shape [64, 64], found [64, 60]" in load_error(
            path
        )

    def test_extra_tensor(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        rewrite(path, lambda tensors: tensors.update(extra=torch.zeros(3)))
        assert "model.safetensors: tensor extra: expected none, found shape [3]" in load_error(path)

    def test_biases_without_attention_bias(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path, bias=True)
        edit_json(path / "config.json", attention_bias=False)
        message = load_error(path)
        assert "tensor model.layers.0.self_attn.k_proj.bias: expected none, found shape [32]" in message
        assert "and 8 more" in message

    def test_untied_without_head(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        edit_json(path / "config.json", tie_word_embeddings=False)
        assert "tensor lm_head.weight: expected shape [128, 64], found none" in load_error(path)

    def test_integer_tensor(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        rewrite(path, lambda tensors: tensors.update({Q_DIFF: torch.zeros(64, 64, dtype=torch.int8)}))
        assert f"tensor {Q_DIFF}: expected dtype F64, F32, F16, BF16, found I8" in load_error(path)

    def test_many_problems_are_one_error(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        edit_json(path / "config.json", intermediate_size=100, num_hidden_layers=3)
        message = load_error(path)
        assert (
            "tensor model.layers.0.mlp.gate_proj.weight: expected shape [100, 64], found [128, 64]" in message
        )
        assert re.search(r"and \d+ more$", message)

    def test_some_diffusion_weights(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        rewrite(path, lambda tensors: tensors.pop(Q_DIFF))
        assert f"tensor {Q_DIFF}: expected shape [64, 64], found none" in load_error(path)

    def test_diffusion_weights_without_block_size(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        edit_json(
            path / "config.json", block_size=None, mask_token_id=None, architectures=["Qwen3ForCausalLM"]
        )
        message = load_error(path)
        assert "has diffusion weights (*_diff), but config.json has no block_size" in message
        assert "add the block_size and mask_token_id" in message

    def test_block_size_without_diffusion_weights(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path, diffusion=False)
        edit_json(path / "config.json", block_size=8, mask_token_id=127)
        message = load_error(path)
        assert "block_size 8, but there are no diffusion weights" in message
        assert "remove block_size and mask_token_id" in message


class TestBrokenFiles:
    def test_no_weights(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
        message = load_error(path)
        assert f"{path} has neither model.safetensors nor model.safetensors.index.json" in message
        assert "found pytorch_model.bin" in message

    @pytest.mark.parametrize("size", [0, 5, 100])
    def test_cut_inside_the_header(self, tmp_path: Path, size: int) -> None:
        path = make_checkpoint(tmp_path)
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        message = load_error(path)
        assert f"{file}: expected a safetensors header, found {size} bytes: download it again" in message

    def test_cut_inside_the_weights(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        file = path / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-10])
        pattern = f"{len(data)} bytes, found {len(data) - 10}, cut short in tensor model.*: download it again"
        assert re.search(pattern, load_error(path))

    def test_bytes_too_many(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        file = path / "model.safetensors"
        size = file.stat().st_size
        with file.open("ab") as stream:
            stream.write(b"12")
        assert f"expected {size} bytes, found {size + 2}: download it again" in load_error(path)

    @pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 1}', b"\xff\xff", b'{"a": {"shape": [1]}}'])
    def test_broken_header(self, tmp_path: Path, header: bytes) -> None:
        path = make_checkpoint(tmp_path)
        file = path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        assert f"{file} has no valid safetensors header" in load_error(path)

    def test_offsets_that_contradict_the_shapes(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path)
        file = path / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data.replace(b'"F32"', b'"F64"'))
        assert "embed_tokens.weight of shape [128, 64] in F64 has 32768 bytes" in load_error(path)

    def test_missing_shard(self, tmp_path: Path) -> None:
        path = sharded(tmp_path)
        shard = sorted(path.glob("*.safetensors"))[1]
        shard.unlink()
        assert f"{shard} is missing, model.safetensors.index.json lists it" in load_error(path)

    def test_shard_without_a_listed_tensor(self, tmp_path: Path) -> None:
        path = sharded(tmp_path)
        shard = sorted(path.glob("*.safetensors"))[1]
        tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        name = sorted(tensors)[0]
        del tensors[name]
        save_file(tensors, shard)
        assert f"{shard}: tensor {name} is missing" in load_error(path)

    def test_shard_with_an_unlisted_tensor(self, tmp_path: Path) -> None:
        path = sharded(tmp_path)
        shard = sorted(path.glob("*.safetensors"))[1]
        tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
        save_file(tensors | {"extra": torch.zeros(1)}, shard)
        assert (
            f"{shard}: found tensor extra, which model.safetensors.index.json expects in no file"
            in load_error(path)
        )

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "isn't valid JSON"),
            ("{}", "expected weight_map to map tensor names to file names"),
            ('{"weight_map": {"a": 1}}', "expected weight_map to map tensor names to file names"),
            ('{"weight_map": {"a": "../model.safetensors"}}', "file names without a folder, found '../model"),
        ],
    )
    def test_broken_index(self, tmp_path: Path, content: str, words: str) -> None:
        path = sharded(tmp_path)
        index = path / "model.safetensors.index.json"
        index.write_text(content)
        message = load_error(path)
        assert str(index) in message
        assert words in message
