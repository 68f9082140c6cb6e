"""Chat templates with limits: the text is the same as without limits, and every hostile template is stopped."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from orthrus.deployments.chat.body import ChatBody
from orthrus.deployments.chat.template import ChatTemplate
from orthrus.errors import ConfigError, RequestError
from orthrus.text.chat_limits import TooMuch, check_templates, render_chat
from orthrus.text.tokenizer import load_tokenizer
from tests.hostile import bounded

MODEL = Path(__file__).parents[2] / "models" / "orthrus-tiny"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "x"], "b": None}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b> & 'you'"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nLet me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"x": 1}'},
    {"role": "user", "content": "ünï — ok?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SAME = {
    "loops": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role }}{% if not loop.last %},{% endif %}"
    "{% else %}none{% endfor %}",
    "loop-controls": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "filtered-loop": "{% for m in messages if m.role == 'user' %}{{ m.content | trim }};{% endfor %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% endfor %}{% set a, b = 1, (2, 3) %}{{ b[1] }}",
    "recursion": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}"
    "{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0, last=none) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index0 %}"
    "{% endfor %}{{ ns.n }}",
    "macros": "{% macro show(m, sep=': ') %}{{ m.role }}{{ sep }}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ show(messages[0]) }}{% call show(messages[1], sep='-') %}{{ messages[1].content }}{% endcall %}",
    "blocks": "{% set x %}a{{ messages | length }}b{% endset %}{{ x * 2 }}{% filter upper %}c{{ x }}{% endfilter %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}|{{ messages | selectattr('role', 'equalto', 'user')"
    " | list | length }}|{{ ' x ' | trim | center(5) }}|{{ missing | default('d') }}|{{ [3, 1] | sort }}",
    "methods": "{{ messages[1].content.replace('<b>', '').split('&')[0].strip() }}|{{ 'a-b'.upper().join(['1', '2']) }}|"
    "{{ '%s:%03d' % ('n', 7) }}|{{ '{:>4}'.format('x') }}|{{ 'x'.startswith('x') }}",
    "numbers": "{{ 7 // 2 + 7 % 4 - 2 * 3 + 2 ** 5 / 4 }}|{{ 1.5 + 2 }}|{{ [1] + [2] }}|{{ range(3) | list }}",
    "tojson": "{{ tools | tojson }}{{ messages[2].tool_calls | tojson(indent=2) }}{{ {'a': [true, none]} }}",
    "undefined": "[{{ missing }}][{{ none }}][{{ messages[0].nothing }}][{% if missing is defined %}x{% endif %}]",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "variables": "{{ enable_thinking }}{{ add_generation_prompt }}{{ eos_token }}",
    "whitespace": "  {%- if true %}\n  a\n  {%- endif %}\n{# note #}b\n",
}
HOSTILE = {
    "doubled-60-times": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60,
    "added-60-times": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60,
    "doubled-in-a-loop": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled-by-blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubled-by-a-macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set x = 'ab' %}"
    + "{% set x = d(x) %}" * 60,
    "doubled-by-replace": "{% set x = 'aa' %}" + "{% set x = x.replace('a', 'aa') %}" * 60,
    "doubled-by-a-filter": "{% set x = 'aa' %}" + "{% set x = x | replace('a', x) %}" * 9,
    "doubled-by-join": "{% set x = 'ab' %}" + "{% set x = [x, x] | join %}" * 60,
    "doubled-by-format": "{% set x = 'ab' %}" + "{% set x = '%s%s' % (x, x) %}" * 60,
    "doubled-by-strings-format": "{% set x = 'ab' %}" + "{% set x = '{0}{0}'.format(x) %}" * 60,
    "doubled-lists": "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "doubled-mappings": "{% set x = {} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "doubled-dicts": "{% set x = 'a' %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
    "doubled-namespaces": "{% set x = 'a' %}" + "{% set x = namespace(a=x, b=x) %}" * 60 + "{{ x }}",
    "multiplied": "{{ 'x' * 10 ** 10 }}",
    "multiplied-list": "{{ [0] * 10 ** 10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power-of-powers": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "endless": "{% for i in range(10 ** 12) %}{% endfor %}",
    "nested-loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested-loops-with-text": "{% for i in range(9999) %}{% for j in range(9999) %}text{% endfor %}{% endfor %}",
    "filters-in-loops": "{% for i in range(99999) %}{% set x = range(9999) | list | sort %}{% endfor %}",
    "comparisons": "{% set x = 'x' * 10 ** 7 %}{% for i in range(99999) %}{% if 'xxxxxxxxz' in x %}{% endif %}{% endfor %}",
    "recursive-macro": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(60) }}",
    "endless-macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide": "{{ 'x'.center(10 ** 10) }}",
    "wide-filter": "{{ 'x' | center(10 ** 10) }}",
    "wide-filter-block": "{% filter center(10 ** 10) %}x{% endfilter %}",
    "wide-map": "{{ ['x'] | map('center', 10 ** 10) | list }}",
    "wide-format": "{{ '%10000000000d' % 1 }}",
    "wide-format-filter": "{{ '%*d' | format(10 ** 10, 1) }}",
    "wide-strings-format": "{{ '{:10000000000}'.format(1) }}",
    "indented": "{{ ('x\n' * 10 ** 6) | indent(10 ** 6) }}",
    "indented-json": "{{ [[[[[[1]]]]]] * 10 ** 6 }}{{ ([1] * 10 ** 6) | tojson(indent=10 ** 6) }}",
    "tabs": "{{ ('\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "made-up-text": "{{ lipsum(10 ** 5) }}",
    "deep": "{{ " + "(" * 100_000 + ")" * 100_000 + " }}",
    "deep-blocks": "{% if true %}" * 100_000,
    "unfinished": "{% for",
    "unknown-filter": "{{ 1 | no_such_filter }}",
    "long": "x" * 2_000_000,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A tokenizer whose template may be changed."""
    return copy.copy(tokenizer)


@pytest.mark.parametrize("kind", SAME)
def test_the_text_is_what_it_is_without_limits(tokenizer: Any, kind: str) -> None:
    settings: dict[str, Any] = {"tools": TOOLS, "enable_thinking": False, "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(MESSAGES, chat_template=SAME[kind], tokenize=False, **settings)
    for _ in range(2):
        assert render_chat(tokenizer, MESSAGES, chat_template=SAME[kind], **settings) == expected
    assert expected


def test_the_embedded_models_text_is_what_it_is_without_limits(tokenizer: Any) -> None:
    messages = [message for message in MESSAGES if message["role"] in ("system", "user")]
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(tokenizer, messages, add_generation_prompt=prompt) == expected


def test_long_conversations_are_within_the_limits(tokenizer: Any) -> None:
    messages = [
        {"role": role, "content": "word " * 400} for _ in range(2000) for role in ("user", "assistant")
    ]
    template = (
        SAME["loops"]
        + "{% for m in messages %}{{ m.content | trim }}{{ m.content.split('x')[-1] }}{% endfor %}"
    )
    with bounded():
        assert len(render_chat(tokenizer, messages, chat_template=template)) > 10_000_000


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_refused(own: Any, kind: str) -> None:
    own.chat_template = HOSTILE[kind]
    with pytest.raises(ConfigError) as caught, bounded():
        check_templates(own)
    assert "the chat template" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_hostile_template_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(HOSTILE["doubled-60-times"])
    words = f"{tmp_path}: the chat template can't be used: it makes more than"
    with pytest.raises(ConfigError, match=words), bounded():
        load_tokenizer(tmp_path)


def test_a_template_may_be_hostile_to_some_conversations_only(tokenizer: Any) -> None:
    template = "{% if messages | length > 1 %}" + HOSTILE["doubled-60-times"] + "{% endif %}x"
    assert render_chat(tokenizer, MESSAGES[:1], chat_template=template) == "x"
    with pytest.raises(TooMuch, match="characters"), bounded():
        render_chat(tokenizer, MESSAGES, chat_template=template)
    # The one after it has its own limits.
    assert render_chat(tokenizer, MESSAGES[:1], chat_template=template) == "x"


def test_a_template_that_wants_other_messages_is_no_mistake(own: Any) -> None:
    for template in (
        "{{ raise_exception('no system prompt') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        None,
    ):
        own.chat_template = template
        check_templates(own)


def test_named_templates_are_checked_too(own: Any) -> None:
    own.chat_template = {"default": "x", "tool_use": HOSTILE["multiplied"]}
    with pytest.raises(ConfigError, match="the chat template can't be used"):
        check_templates(own)


def test_a_conversation_that_makes_a_template_exceed_the_limits_is_a_request_error(own: Any) -> None:
    own.chat_template = "{% if messages | length > 1 %}" + HOSTILE["doubled-60-times"] + "{% endif %}x"
    template = ChatTemplate(own)
    message = {"role": "user", "content": "Hi"}
    assert template.apply(ChatBody.model_validate({"model": "m", "messages": [message]})).tokens
    body = ChatBody.model_validate({"model": "m", "messages": [message, message]})
    with pytest.raises(
        RequestError, match="the chat template refuses these messages: it makes more than"
    ) as caught:
        template.apply(body)
    assert caught.value.param == "messages"
