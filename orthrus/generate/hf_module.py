"""Check that a Hugging Face module computes just what its class and its weights say: the engine takes over only these."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import module as torch_module

from orthrus.errors import ConfigError

# A forward method from elsewhere may compute something else. A model's own code from the hub counts as its class.
_TRUSTED = ("torch.nn.", "transformers.", "transformers_modules.")


def check_as_written(model: nn.Module) -> None:
    """Raise ConfigError that names what was added to the model or replaced in it, because the engine would leave it out."""
    if problem := next(_additions(model), None):
        raise ConfigError(
            f"{problem}, which accelerate would leave out of what the model computes: remove it first, or merge it into the "
            "weights"
        )


def _additions(model: nn.Module) -> Iterator[str]:
    for kind, hooks in (
        ("hook", torch_module._global_forward_hooks),
        ("pre-hook", torch_module._global_forward_pre_hooks),
    ):
        for hook in hooks.values():
            yield f"a forward {kind} for all modules is registered ({_name(hook)})"
    for path, module in model.named_modules():
        where = f"the model's {path}" if path else "the model"
        for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
            for hook in hooks.values():
                # transformers' own hooks only record values.
                if not _module(hook).startswith("transformers."):
                    yield f"{where} has a forward {kind} ({_name(hook)})"
        if "forward" in vars(module):
            yield f"{where} has a forward method of its own ({_name(module.forward)})"
        if not f"{_module(type(module).forward)}.".startswith(_TRUSTED):
            yield f"{where} is a {type(module).__name__}, whose forward method is neither torch's nor transformers'"
        if hasattr(module, "parametrizations"):
            yield f"{where} has parametrizations"


def _module(function: object) -> str:
    return getattr(function, "__module__", None) or type(function).__module__


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
