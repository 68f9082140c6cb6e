"""The answer to `GET /tokenizer_info`, as in vLLM: the `tokenizer_config.json`, for clients that do not have it."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Left out, because they are paths on this machine.
_PLACES = {
    "auto_map",
    "merges_file",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "tokenizer_object",
    "vocab_file",
}
_EXACT = 1 << 53


def tokenizer_info(tokenizer: Any, max_model_len: int) -> dict[str, Any]:
    """The configuration as JSON. model_max_length is `max_model_len`: a tokenizer without a limit has 10**30 there."""
    given = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _PLACES}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {
        **_plain(given),
        **{name: _plain(getattr(tokenizer, name)) for name in _SPECIAL_TOKENS},
        "added_tokens_decoder": {
            str(token_id): _details(token) for token_id, token in tokenizer.added_tokens_decoder.items()
        },
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": max_model_len,
        "chat_template": template,
    }


def _details(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _plain(value: Any) -> Any:
    """A setting as JSON. Null if JSON has no such value, or for an integer that a double can't hold exactly."""
    match value:
        case AddedToken():
            return value.content
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple() | set():
            return [_plain(item) for item in value]
        case int() if abs(value) < _EXACT:
            return value
        case str() | None:
            return value
        case float() if abs(value) < float("inf"):
            return value
        case _:
            return None
