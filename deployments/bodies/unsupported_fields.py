"""Fields of other servers' APIs that we refuse, and what to send instead."""

from collections.abc import Mapping
from typing import Any

from orthrus.errors import RequestError

_TEXT_ONLY = "this model reads and writes text only: remove it"
_ONE_MODEL = "the model that the request names is the one that answers: remove it"
_NO_BEAMS = "only beam search has it: choose with temperature, top_p and n"
_DISAGGREGATED = "replicas share no keys and values: remove it"
_OLLAMA = "send temperature, seed, max_tokens and the like at the top level"

UNSUPPORTED: dict[str, str] = {
    # OpenAI
    "audio": _TEXT_ONLY,
    "background": "answers are given while the client waits: remove it",
    "function_call": "OpenAI has replaced it: send tool_choice",
    "functions": "OpenAI has replaced it: send tools",
    "moderation": "answers are not moderated here: remove it",
    "suffix": "the model only completes text from the left: remove it",
    "verbosity": "say in the messages how long the answer should be, and leave it out or send medium",
    "web_search_options": "there is no search here: remove it",
    # vLLM
    "chat_template": "the model's own is used: set what it reads with chat_template_kwargs",
    "guided_whitespace_pattern": "JSON comes on one line, or laid out in lines: remove it",
    "kv_transfer_params": _DISAGGREGATED,
    "length_penalty": _NO_BEAMS,
    "detokenize": "send return_token_ids for the tokens, which come beside the text",
    "early_stopping": _NO_BEAMS,
    "logits_processors": "send logit_bias, bad_words or allowed_token_ids",
    "media_io_kwargs": _TEXT_ONLY,
    "mm_processor_kwargs": _TEXT_ONLY,
    "prompt_embeds": "send prompt, as text or as token ids",
    "repetition_detection": "send repetition_penalty",
    "structural_tag": "send tools, or structured_outputs with a grammar",
    "thinking_token_budget": "limit the answer with max_completion_tokens, or send enable_thinking: false",
    "use_beam_search": "decoding is greedy or sampled: choose with temperature and n",
    "vllm_xargs": "send the parameters by their names",
    # SGLang
    "bootstrap_host": _DISAGGREGATED,
    "bootstrap_port": _DISAGGREGATED,
    "bootstrap_room": _DISAGGREGATED,
    "custom_logit_processor": "send logit_bias, bad_words or allowed_token_ids",
    "custom_params": "send the parameters by their names",
    "data_parallel_rank": "name a session with prompt_cache_key, which stays on one replica",
    "extra_key": "send cache_salt",
    "input_ids": "send the token ids as prompt to /v1/completions",
    "lora_path": _ONE_MODEL,
    "no_stop_trim": "send include_stop_str_in_output",
    "return_hidden_states": "send logprobs",
    "rid": "send request_id, or the header x-request-id",
    "sampling_seed": "send seed",
    "separate_reasoning": "reasoning comes as reasoning_content: leave it out, or send include_reasoning: false",
    "session_params": "name a session with prompt_cache_key",
    "stop_regex": "send stop, with the texts themselves",
    "stream_reasoning": "reasoning is streamed as it comes: leave it out",
    # Others
    "best_of": "ask for n, and choose on your side",
    "conversation": "send the messages so far",
    "documents": "put their text into the messages: this model's chat template has no documents",
    "do_sample": "send temperature, which is 0 for greedy decoding",
    "extra_body": "its fields belong at the top level of the body: send them there",
    "grammar": "send structured_outputs: {grammar: ...}",
    "keep_alive": "the model stays loaded: remove it",
    "max_completion_tokens": "send max_tokens",
    "max_length": "send max_tokens",
    "max_new_tokens": "send max_tokens",
    "max_output_tokens": "send max_tokens, or use /v1/responses",
    "messages": "send prompt, or use /v1/chat/completions",
    "models": _ONE_MODEL,
    "n_predict": "send max_tokens",
    "num_predict": "send max_tokens",
    "options": _OLLAMA,
    "plugins": "there are none here: remove it",
    "prompt": "send messages, or use /v1/completions",
    "provider": _ONE_MODEL,
    "add_special_tokens": "the chat template writes them: remove it",
    "echo": "prompts are given back by /v1/completions: remove it",
    "input": "send messages to /v1/chat/completions, or prompt to /v1/completions",
    "random_seed": "send seed",
    "route": _ONE_MODEL,
    "safe_prompt": "send your instructions as a message with the role system",
    "safety_settings": "answers are not filtered here: remove it",
    "stop_sequences": "send stop",
    "system": "send a message with the role system",
    "thinking": "send enable_thinking, true or false",
    "reasoning.max_tokens": "limit the answer with max_completion_tokens, or send enable_thinking: false",
    "tools": "send them to /v1/chat/completions",
    "top_logprobs": "send logprobs, the number of them",
    "thinking_budget": "limit the answer with max_completion_tokens, or send enable_thinking: false",
    "transforms": "to shorten a prompt that is too long, send truncate_prompt_tokens",
    "typical_p": "send top_p or min_p",
}
# Values that ask only for what the server does anyway. So do null, false and empty values of most fields.
_DEFAULTS: dict[str, Any] = {
    "best_of": 1,
    "detokenize": True,
    "length_penalty": 1.0,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "typical_p": 1.0,
    "verbosity": "medium",
}
# Fields whose value false asks for something.
_NOT_FALSE = frozenset({"detokenize", "separate_reasoning", "stream_reasoning"})


def drop_neutral(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without unsupported fields that ask for nothing. `fields`: those of the body itself. Raises RequestError."""
    kept = {}
    for name, value in given.items():
        advice = None if name in fields else UNSUPPORTED.get(name)
        if advice is None:
            kept[name] = value
        elif not _asks_for_nothing(name, value):
            raise RequestError(f"{name} is not supported: {advice}", name)
    return kept


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name in _DEFAULTS and value == _DEFAULTS[name]:
        return True
    return name not in _NOT_FALSE and (value is None or value is False or value in ("", []))
