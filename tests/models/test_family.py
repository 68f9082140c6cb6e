"""Adding a model family: Llama, which norms neither queries nor keys, as one class and one registration."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import orthrus
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.models.checkpoint import load_weights, save_checkpoint
from orthrus.models.families import FAMILIES, family_of, load_config, register
from orthrus.models.family import Family, HuggingFaceClasses
from orthrus.requests.request import SamplingParams
from orthrus.training.model import load_frozen
from tests.checkpoints import add_diffusion, edit_json

VOCABULARY = 96
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28], list(range(60, 90))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


class Llama(Family):
    """Llama (Touvron et al., 2023): the base class's layer as it is."""

    model_types = ("llama",)
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    qk_norm = False

    def hugging_face(self) -> HuggingFaceClasses:
        return HuggingFaceClasses(LlamaConfig, LlamaForCausalLM, LlamaRotaryEmbedding)


class Renamed(Llama):
    """Llama, but its tensors outside attention and MLP have other names."""

    model_types = ("renamed",)
    embedding = "tokens.weight"
    layer_prefix = "blocks"
    first_norm = "norm_1.weight"
    last_norm = "norm.weight"
    head = "output.weight"


@pytest.fixture(autouse=True)
def llama() -> Iterator[None]:
    known = dict(FAMILIES)
    register(Llama())
    register(Renamed())
    yield
    FAMILIES.clear()
    FAMILIES.update(known)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bias"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=request.param,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
    return model


@pytest.fixture
def checkpoint(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def with_diffusion(path: Path) -> Path:
    add_diffusion(path, noise=0.02)
    edit_json(path / "config.json", architectures=["OrthrusLM"], block_size=8, mask_token_id=VOCABULARY - 1)
    return path


def engine(path: Path, **settings: Any) -> Engine:
    return Engine.from_pretrained(EngineConfig(model=str(path), kv_cache_tokens=1024, **settings))


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    rows = model.generate(
        torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, pad_token_id=0
    )
    return rows[0, len(prompt) :].tolist()


def test_a_family_that_is_not_registered_is_named(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    del FAMILIES["llama"]
    for look in (lambda: load_config(checkpoint), lambda: family_of(config)):
        with pytest.raises(
            ConfigError, match="model_type 'llama' is not supported: use a model of type qwen3"
        ):
            look()


def test_logits_and_greedy_text_are_hugging_faces(model: LlamaForCausalLM, checkpoint: Path) -> None:
    ours = engine(checkpoint)
    for prompt in PROMPTS:
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(ours.score(prompt), theirs, atol=1e-5, rtol=1e-5)
    for prompt, completions in zip(PROMPTS, ours.generate(PROMPTS, GREEDY), strict=True):
        assert list(completions[0].token_ids) == greedy(model, prompt)


def test_a_family_may_rename_tensors(checkpoint: Path) -> None:
    expected = engine(checkpoint).score(PROMPTS[0])
    names = {
        "model.embed_tokens": "tokens",
        "model.layers": "blocks",
        "input_layernorm": "norm_1",
        "model.norm": "norm",
        "lm_head": "output",
    }
    tensors = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors")
    edit_json(checkpoint / "config.json", model_type="renamed")
    assert torch.equal(engine(checkpoint).score(PROMPTS[0]), expected)


@pytest.mark.parametrize(("weights", "least"), [("same", 1.25), ("fp8", 1.2)])
def test_drafts_of_its_diffusion_view_are_accepted(
    model: LlamaForCausalLM, checkpoint: Path, weights: str, least: float
) -> None:
    ours = engine(with_diffusion(checkpoint), schedule="orthrus", adaptive_draft=False, draft_weights=weights)
    for prompt, completions in zip(PROMPTS, ours.generate(PROMPTS, GREEDY), strict=True):
        assert list(completions[0].token_ids) == greedy(model, prompt)
    # Drafts of a view that read the wrong weights would be right once in 96 times.
    assert ours.stats.tokens_per_cycle > least


def test_its_checkpoint_is_written_as_hugging_faces(checkpoint: Path, tmp_path: Path) -> None:
    config = load_config(checkpoint)
    assert (config.model_type, config.head_dim) == ("llama", 16)
    weights = load_weights(checkpoint, config, "cpu")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == family_of(config).tensor_shapes(config)
    assert not any("_norm." in name for name in shapes if "self_attn" in name)
    save_checkpoint(tmp_path / "copy", config, weights)
    assert load_config(tmp_path / "copy") == config
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())


def test_generate_and_training_take_it(model: LlamaForCausalLM, checkpoint: Path) -> None:
    accelerated = orthrus.accelerate(model, kv_cache_tokens=512)
    for prompt in PROMPTS:
        rows = accelerated.generate(torch.tensor([prompt]), max_new_tokens=24, pad_token_id=0)
        assert rows[0, len(prompt) :].tolist() == greedy(model, prompt)
    trainable = load_frozen(checkpoint, 8, VOCABULARY - 1, torch.device("cpu"))
    with torch.inference_mode():
        hidden, _ = trainable(torch.tensor(PROMPTS[:1]))
        theirs = model(torch.tensor(PROMPTS[:1])).logits
        torch.testing.assert_close(trainable.logits(hidden), theirs, atol=1e-5, rtol=1e-5)
