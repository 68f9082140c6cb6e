"""What `orthrus.accelerate` takes over from a Hugging Face module, and which modules it refuses."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orthrus.errors import ConfigError
from orthrus.generate.accelerated import AcceleratedModel
from tests.checkpoints import make_checkpoint
from tests.generate.against import PROMPT, VOCAB, accelerated, assert_same, load_reference


@pytest.fixture(scope="module")
def module(checkpoint: Path) -> Qwen3ForCausalLM:
    """A Hugging Face module with the diffusion view's parameters where Orthrus has them."""
    module = load_reference(checkpoint)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if "_diff." in name:
            owner, attribute, _ = name.rsplit(".", 2)
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(tensor)
            module.get_submodule(owner).add_module(attribute, holder)
    return module


def test_module_with_diffusion_weights(module: Qwen3ForCausalLM, model: AcceleratedModel) -> None:
    own = accelerated(module)
    assert own.engine.schedule_name == "orthrus"
    result = own.generate(PROMPT, max_new_tokens=32)
    assert result.tolist() == model.generate(PROMPT, max_new_tokens=32).tolist()
    assert own.stats == model.stats


def test_module_keeps_its_weights(module: Qwen3ForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = accelerated(module)
    model.generate(PROMPT, max_new_tokens=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(model(PROMPT).logits, module(PROMPT).logits)


def test_module_loaded_without_its_diffusion_weights(checkpoint: Path, reference: Qwen3ForCausalLM) -> None:
    with pytest.warns(UserWarning, match="without the diffusion weights"):
        model = accelerated(reference)
    assert model.engine.schedule_name == "ngram"
    assert_same(model, reference, PROMPT, max_new_tokens=16)
    with pytest.raises(ConfigError, match=str(checkpoint)):
        accelerated(reference, schedule="orthrus")


def test_module_attributes(module: Qwen3ForCausalLM) -> None:
    model = accelerated(module)
    assert model.config is module.config
    assert model.generation_config is module.generation_config
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.eval() is model
    assert model.lm_head is module.lm_head
    assert model.num_parameters() == module.num_parameters()
    with pytest.raises(AttributeError, match="device="):
        model.to("cpu")
    assert not hasattr(model, "no_such_attribute")


def test_checkpoint_attributes(model: AcceleratedModel) -> None:
    assert model.config.vocab_size == VOCAB
    assert model.config.block_size == 8
    assert model.device == torch.device("cpu")
    assert "orthrus" in repr(model)
    with pytest.raises(AttributeError, match="from_pretrained"):
        model(PROMPT)
    assert not hasattr(model, "lm_head")


def test_dtype_is_converted(module: Qwen3ForCausalLM) -> None:
    model = accelerated(module, dtype=torch.float64)
    assert model.dtype == torch.float64
    expected = module.generate(PROMPT, max_new_tokens=8)
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == expected.tolist()


def test_what_cannot_be_accelerated(checkpoint: Path, module: Qwen3ForCausalLM) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    with pytest.raises(ConfigError, match="llama"):
        accelerated(llama)
    with pytest.raises(ConfigError, match="int"):
        accelerated(7)
    with pytest.raises(ConfigError, match="max_num_seq"):
        accelerated(checkpoint, max_num_seq=3)
    with pytest.raises(ConfigError, match="schedule"):
        accelerated(checkpoint, schedule="fast")
    adapted = copy.deepcopy(module)
    adapted.model.layers[0].self_attn.q_proj.add_module("lora_A", torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="lora_A"):
        accelerated(adapted)


def test_gpus_share_checkpoints_only() -> None:
    """One process has the module. The setting would be left out without a word."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 1}
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128}
    module = Qwen3ForCausalLM(Qwen3Config(**shape, **sizes))
    with pytest.raises(ConfigError, match="tensor_parallel_size 2 takes a checkpoint"):
        accelerated(module, tensor_parallel_size=2)


def test_a_head_untied_by_hand_counts(tmp_path: Path) -> None:
    reference = load_reference(make_checkpoint(tmp_path / "model", vocab_size=VOCAB, diffusion=False))
    tied = assert_same(accelerated(reference), reference, PROMPT, max_new_tokens=12)
    generator = torch.Generator().manual_seed(1)
    reference.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 64, generator=generator))
    assert reference.config.tie_word_embeddings
    own = assert_same(accelerated(reference), reference, PROMPT, max_new_tokens=12)
    assert own.tolist() != tied.tolist()


def test_a_file_s_own_head_counts(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", vocab_size=VOCAB, diffusion=False)
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(1)
    tensors["lm_head.weight"] = torch.randn(VOCAB, 64, generator=generator)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert_same(accelerated(path), load_reference(path), PROMPT, max_new_tokens=12)


def _replaced(module: Qwen3ForCausalLM) -> None:
    mlp = module.model.layers[0].mlp
    mlp.forward = lambda x: 0.0 * x


def _subclassed(module: Qwen3ForCausalLM) -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    module.model.layers[1].self_attn.o_proj.__class__ = Shifted


def _parametrized(module: Qwen3ForCausalLM) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.model.layers[0].mlp.up_proj)


def _int8(module: Qwen3ForCausalLM) -> None:
    weight = torch.zeros_like(module.lm_head.weight, dtype=torch.int8)
    module.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)


CHANGES: dict[str, tuple[Callable[[Qwen3ForCausalLM], object], str]] = {
    "hook": (lambda m: m.register_forward_hook(lambda *_: None), "the model has a forward hook"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(lambda *_: None), "the model has a forward pre-hook"),
    "hook-with-kwargs": (
        lambda m: m.model.register_forward_hook(lambda *_: None, with_kwargs=True),
        "the model's model has a forward hook",
    ),
    "hook-on-a-layer": (
        lambda m: m.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None),
        "the model's model.layers.1.mlp.down_proj has a forward hook",
    ),
    "pre-hook-on-the-head": (
        lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
        "the model's lm_head has a forward pre-hook",
    ),
    "replaced-forward": (_replaced, "the model's model.layers.0.mlp has a forward method of its own"),
    "subclass": (_subclassed, "the model's model.layers.1.self_attn.o_proj is a Shifted"),
    "parametrization": (_parametrized, "the model's model.layers.0.mlp.up_proj"),
    "int8": (_int8, "lm_head.weight is torch.int8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_additions_to_a_module_are_refused(module: Qwen3ForCausalLM, change: str) -> None:
    apply, words = CHANGES[change]
    changed = copy.deepcopy(module)
    accelerated(changed)
    apply(changed)
    with pytest.raises(ConfigError, match=re.escape(words)):
        accelerated(changed)


def test_hooks_of_transformers_itself_are_allowed(module: Qwen3ForCausalLM) -> None:
    watched = copy.deepcopy(module)
    watched.enable_input_require_grads()
    watched(PROMPT, output_hidden_states=True)
    accelerated(watched)


def test_weights_that_are_on_no_device(module: Qwen3ForCausalLM) -> None:
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(module.config)
    with pytest.raises(ConfigError, match="on no device"):
        accelerated(empty, schedule="ar")


def test_wrappers_are_refused(module: Qwen3ForCausalLM) -> None:
    with pytest.raises(ConfigError, match="got OptimizedModule"):
        accelerated(torch.compile(module))
