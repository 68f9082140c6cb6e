"""Checkpoints: every variant loads and saves bit for bit, Hugging Face reads what we write, and wrong ones say why."""

import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3ForCausalLM
from transformers.utils import logging as progress

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import CheckpointError, ConfigError
from orthrus.models.checkpoint import compute_dtype, load_weights, save_checkpoint
from orthrus.models.config import ModelConfig
from orthrus.models.families import family_of, load_config
from orthrus.models.hub import HubUnreachable, resolve
from tests.checkpoints import edit_json, make_checkpoint
from tests.models.checkpoint_files import load, load_error, rewrite, sharded
from tests.reference import Reference

VARIANTS: dict[str, dict[str, Any]] = {
    "orthrus": {},
    "plain": {"diffusion": False},
    "untied": {"tie": False},
    "bias": {"bias": True},
    "yarn": {"yarn": True},
    "one-kv-head": {"kv_heads": 1, "head_dim": 20},
    "no-gqa": {"kv_heads": 4, "head_dim": 8, "layers": 1},
    "bfloat16": {"dtype": torch.bfloat16, "correlated": False},
    "float16-plain-untied-bias": {"dtype": torch.float16, "diffusion": False, "tie": False, "bias": True},
}

TINY = ModelConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
    block_size=4,
    mask_token_id=7,
)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["single", "sharded"])
def test_round_trip(tmp_path: Path, variant: dict[str, Any], max_shard_bytes: int) -> None:
    original = make_checkpoint(tmp_path / "original", **variant)
    config, weights = load(original)
    assert {n: tuple(t.shape) for n, t in weights.items()} == family_of(config).tensor_shapes(config)
    # What Hugging Face wrote is what we read.
    stored = load_file(original / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in stored)

    saved = tmp_path / "saved"
    save_checkpoint(saved, config, weights, max_shard_bytes=max_shard_bytes)
    again, loaded = load(saved)
    assert again == config
    assert list(loaded) == list(weights)
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert (saved / "model.safetensors").exists() == (max_shard_bytes == 10**9)

    # And what we wrote is what Hugging Face reads: the AR view, bit for bit the same logits.
    prompt = torch.arange(1, 20)[None]
    for model_class in (Qwen3ForCausalLM, AutoModelForCausalLM):
        ours, info = model_class.from_pretrained(saved, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        assert all("_diff." in name for name in info["unexpected_keys"])
        theirs = Qwen3ForCausalLM.from_pretrained(original)
        assert ours.dtype == theirs.dtype == getattr(torch, config.dtype)
        with torch.inference_mode():
            assert torch.equal(ours(prompt).logits, theirs(prompt).logits)


def test_sharded_checkpoints_of_hugging_face_load(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "whole", diffusion=False)
    Qwen3ForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    _, whole = load(path)
    _, shards = load(tmp_path / "shards")
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_shards_respect_the_limit_and_the_index_adds_up(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(path / file).values()) for file in files]
    assert max(sizes) <= 60_000
    assert sum(sizes) == index["metadata"]["total_size"]


def test_saving_again_replaces_the_old_weights(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    config, weights = load(path)
    save_checkpoint(path, config, {name: tensor + 1 for name, tensor in weights.items()})
    assert [file.name for file in path.glob("*.safetensors*")] == ["model.safetensors"]
    _, once = load(path)
    save_checkpoint(path, config, weights, max_shard_bytes=60_000)
    assert not (path / "model.safetensors").exists()
    _, twice = load(path)
    assert all(torch.equal(once[name], tensor + 1) for name, tensor in weights.items())
    assert all(torch.equal(twice[name], tensor) for name, tensor in weights.items())


def test_loaded_tensors_do_not_change_with_their_file(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    _, weights = load(path)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_saved_dtype_is_that_of_the_tensors(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    config = load_config(path)
    weights = load_weights(path, config, "cpu", "auto")
    save_checkpoint(tmp_path / "full", config, weights)
    assert load_config(tmp_path / "full") == replace(config, dtype="float32")


def test_views_that_share_memory_or_are_strided_save(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "original")
    config, weights = load(path)
    for name in list(weights):
        if "_diff." in name:
            weights[name] = weights[name.replace("_diff.", ".")]
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = embedding.T.contiguous().T
    weights["lm_head.weight"] = embedding
    save_checkpoint(tmp_path / "saved", config, weights)
    _, loaded = load(tmp_path / "saved")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
    assert "lm_head.weight" not in loaded


def test_generation_config_is_written(tmp_path: Path) -> None:
    config, weights = load(make_checkpoint(tmp_path / "original", eos_token_id=[3, 9]))
    save_checkpoint(tmp_path / "saved", replace(config, pad_token_id=3), weights)
    generation = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (generation.eos_token_id, generation.pad_token_id) == ([3, 9], 3)


def test_the_tokenizer_is_saved_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "b")))
    config, weights = load(make_checkpoint(tmp_path / "original"))
    save_checkpoint(tmp_path / "saved", config, weights, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == {"a": 0, "b": 1}


def test_tied_checkpoint_may_store_its_head(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)

    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(path, add_head)
    _, weights = load(path)
    assert "lm_head.weight" not in weights


def test_a_head_of_its_own_counts_under_a_tied_config(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", diffusion=False)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(128, 64)}))
    config, weights = load(path)
    assert config.tie_word_embeddings
    prompt = [3, 1, 4, 1, 5]
    theirs = Qwen3ForCausalLM.from_pretrained(path)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    engine = Engine.from_pretrained(EngineConfig(model=str(path), kv_cache_tokens=64))
    torch.testing.assert_close(engine.score(prompt), expected, rtol=1e-4, atol=1e-4)
    # What is written says so itself.
    save_checkpoint(tmp_path / "saved", config, weights)
    saved, again = load(tmp_path / "saved")
    assert not saved.tie_word_embeddings
    assert torch.equal(again["lm_head.weight"], weights["lm_head.weight"])


def test_a_head_under_a_tied_config_has_the_embeddings_shape(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, diffusion=False)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(128, 32)}))
    assert "tensor lm_head.weight: expected shape [128, 64], found [128, 32]" in load_error(path)


def test_compute_dtype() -> None:
    half = replace(TINY, dtype="bfloat16")
    assert compute_dtype("auto", half, "cuda:0") is torch.bfloat16
    assert compute_dtype("auto", half, torch.device("cpu")) is torch.float32
    assert compute_dtype("float64", half, "cpu") is torch.float64
    assert compute_dtype(torch.float16, half, "cpu") is torch.float16
    with pytest.raises(ConfigError, match=r"dtype 'int8' is not supported: use auto or one of float32"):
        compute_dtype("int8", half, "cpu")


def test_loading_casts(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    config, exact = load(path)
    wide = load_weights(path, config, "cpu", torch.float64)
    assert all(torch.equal(wide[name], tensor.double()) for name, tensor in exact.items())


class TestSaveErrors:
    def test_tensors_that_are_not_the_configs(self, tmp_path: Path) -> None:
        tensors = {name: torch.zeros(shape) for name, shape in family_of(TINY).tensor_shapes(TINY).items()}
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.zeros(8, 5)
        tensors["extra"] = torch.zeros(1)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path / "saved", TINY, tensors)
        message = str(caught.value)
        assert "tensor model.norm.weight: expected shape [4], found none" in message
        assert "tensor lm_head.weight: expected shape [8, 4], found [8, 5]" in message
        assert "tensor extra: expected none, found one" in message
        assert not (tmp_path / "saved").exists()

    def test_mixed_dtypes(self, tmp_path: Path) -> None:
        tensors = {name: torch.zeros(shape) for name, shape in family_of(TINY).tensor_shapes(TINY).items()}
        tensors["model.norm.weight"] = torch.zeros(4, dtype=torch.bfloat16)
        with pytest.raises(CheckpointError, match=r"one dtype, found .*bfloat16.*float32.*cast them first"):
            save_checkpoint(tmp_path, TINY, tensors)


@pytest.mark.parametrize("wanted", [True, False])
def test_loading_shows_hugging_faces_progress_bar(
    tiny_orthrus: Path, wanted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (progress.enable_progress_bar if wanted else progress.disable_progress_bar)()
    try:
        load_weights(tiny_orthrus, load_config(tiny_orthrus), "cpu")
    finally:
        progress.disable_progress_bar()
    assert ("loading tiny-orthrus: 100%" in capsys.readouterr().err) == wanted


class TestResolve:
    def test_a_directory_is_itself(self, tmp_path: Path) -> None:
        assert resolve(tmp_path) == tmp_path
        assert resolve(str(tmp_path)) == tmp_path

    def test_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        file.touch()
        with pytest.raises(CheckpointError, match=r"is a file: give the directory"):
            resolve(file)

    @pytest.mark.parametrize("model", ["./nowhere", "/no/where", "nowhere", "a/b/c", Path("no/where")])
    def test_no_such_directory(self, model: str | Path) -> None:
        with pytest.raises(CheckpointError, match=r"no directory .*: give a directory .* or a hub id"):
            resolve(model)

    def test_an_invalid_hub_id(self) -> None:
        with pytest.raises(CheckpointError, match=r"no valid hub id either"):
            resolve("who knows/what")

    def test_a_hub_id_without_network(self) -> None:
        with pytest.raises(
            CheckpointError, match=r"neither in the local hub cache nor can the hub be reached"
        ):
            resolve("nobody-at-all/no-such-model")

    def test_a_name_that_begins_with_a_folder_is_a_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hub isn't asked, which could take minutes, and both readings get advice."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("orthrus.models.hub.HfApi", None)
        make_checkpoint(tmp_path / "models" / "tiny")
        with pytest.raises(CheckpointError) as caught:
            resolve("models/tyni")
        assert str(caught.value) == (
            "no directory models/tyni, and models is a folder here with the models tiny: correct the path. If you mean the "
            "hub's models/tyni, fetch it first: hf download models/tyni"
        )

    def test_a_hub_that_does_not_answer_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that takes the connection and says nothing."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hub = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setattr("orthrus.models.hub.HfApi", lambda: hub)
            monkeypatch.setattr("orthrus.models.hub._HUB_SECONDS", 0.2)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            begin = time.monotonic()
            with pytest.raises(HubUnreachable, match="nor can the hub be reached"):
                resolve("nobody-at-all/no-such-model")
            assert time.monotonic() - begin < 60

    def test_a_hub_id_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repo = tmp_path / "models--someone--tiny"
        snapshot = make_checkpoint(repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        path = resolve("someone/tiny")
        assert path == snapshot
        assert load_config(path).name == "someone/tiny"


class TestReference:
    """The reference decoder is only worth something if it is right itself."""

    def test_decoding_is_exact_and_drafts_are_accepted(self, tiny_reference: Reference) -> None:
        tokens, cycles = tiny_reference.decode([3, 1, 4, 1, 5], 48)
        assert tokens == tiny_reference.decode_ar([3, 1, 4, 1, 5], 48)
        assert len(tokens) == 48
        assert 47 / cycles > 1.1

    def test_a_block_is_one_pass_over_context_and_block(self, tmp_path: Path) -> None:
        """With equal weights in both views, cached context + block is one pass with a hand-made mask."""
        reference = Reference(make_checkpoint(tmp_path, noise=0.0))
        context, newest, length = [9, 8, 7, 6], 5, 6
        rows = [*context, newest] + [reference.mask_token_id] * (length - 1)
        visible = torch.ones(len(rows), len(rows)).tril()
        visible[len(context) :] = 1
        mask = torch.zeros_like(visible).masked_fill(visible == 0, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            expected = reference.ar(torch.tensor([rows]), attention_mask=mask[None, None]).logits[0]
        drafted = reference.diffusion_logits(context, newest, length)
        torch.testing.assert_close(drafted, expected[len(context) :], atol=1e-5, rtol=1e-5)
        # A block of one row is the AR view itself; more rows change what the first one sees.
        alone = reference.diffusion_logits(context, newest, 1)
        torch.testing.assert_close(
            alone[0], reference.ar_logits([*context, newest])[-1], atol=1e-5, rtol=1e-5
        )
        assert (drafted[0] - alone[0]).abs().max() > 0.1

    def test_text_ends_with_the_first_end_token(self, tmp_path: Path) -> None:
        text = Reference(make_checkpoint(tmp_path)).decode_ar([3, 1, 4], 40)
        edit_json(tmp_path / "generation_config.json", eos_token_id=[text[20]])
        reference = Reference(tmp_path)
        ended, _ = reference.decode([3, 1, 4], 40)
        assert ended == reference.decode_ar([3, 1, 4], 40) == text[: text.index(text[20]) + 1]
