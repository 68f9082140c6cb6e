"""Render chat templates, which anyone may have written, within limits on time, steps and text.

A template is a program. Jinja's sandbox limits what it may touch, but not how long it runs or how much memory it takes. So
every loop, call, filter, operator and output in its syntax tree is replaced by a call of a function in this module, which
counts steps and characters before they are spent. The rest is transformers' own: its Jinja environment, and
`apply_chat_template`.
"""

import re
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

from orthrus.errors import ConfigError
from orthrus.files import one_line

MOST_TEMPLATE_CHARACTERS = 1 << 20
_STEPS = 1 << 20
_CHARACTERS = 1 << 26
_ITEMS = 1 << 19
"""Items that may be visited in lists and mappings when their size is measured."""
_DIGITS = 1 << 16
"""The longest integer, in bits."""
_SECONDS = 1.0
"""In CPU time, because a busy machine must not reject what an idle one accepts."""
_ARGUMENT = 1 << 20
_END_OF_MESSAGE = "END_OF_THE_MESSAGE_TO_CONTINUE"
# Calls and filters whose result may be as long as the product of the text's and the arguments' lengths.
_GROWING = {
    *("replace", "join", "format", "expandtabs", "indent", "tojson", "center", "ljust", "rjust", "zfill"),
    *("translate", "map", "wordwrap", "batch", "slice"),
}
# Filters that don't turn all of a list or mapping into text.
_SHALLOW = {
    *(
        "length",
        "count",
        "first",
        "last",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "map",
        "default",
        "d",
    ),
    *("list", "items", "reverse", "attr", "batch", "slice", "random"),
}
_WIDE_FORMAT = re.compile(r"\d{5}|\*")


class TooMuch(TemplateError):
    """The template takes more steps, time or text than any conversation needs."""


class _Budget:
    def __init__(self) -> None:
        self.steps = _STEPS
        self.characters = _CHARACTERS
        self.items = _ITEMS
        self.end = time.thread_time() + _SECONDS

    def step(self, count: int = 1) -> None:
        before, self.steps = self.steps, self.steps - count
        if self.steps < 0:
            raise TooMuch(f"it takes more than {_STEPS:,} steps")
        if before >> 3 != self.steps >> 3 and time.thread_time() > self.end:
            raise TooMuch(f"it takes more than {_SECONDS:g} s")

    def grow(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise TooMuch(f"it makes more than {_CHARACTERS:,} characters of text")


_budget: ContextVar[_Budget] = ContextVar("budget")


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    chat_template: str | None = None,
    continue_final_message: bool = False,
    **settings: Any,
) -> str:
    """The text of `tokenizer.apply_chat_template`. Raises TooMuch beyond the limits, else what that method raises.

    chat_template: by default the tokenizer's. continue_final_message: end the text after the content of the last message,
    which must be text. settings: tools, add_generation_prompt, variables of the template and so on.
    """
    if chat_template is None:
        chat_template = tokenizer.get_chat_template(tools=settings.get("tools"))
    limited = _limited(chat_template)
    if continue_final_message:
        # transformers can't do it: it searches the template's text, and gets a syntax tree instead.
        *before, last = messages
        messages = [*before, {**last, "content": f"{last['content']}{_END_OF_MESSAGE} "}]
    token = _budget.set(_Budget())
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=limited, tokenize=False, **settings))
    finally:
        _budget.reset(token)
    return _up_to_the_end_of_message(text) if continue_final_message else text


def _up_to_the_end_of_message(text: str) -> str:
    """A rendered conversation up to the end of its last message's content."""
    begun, found, rest = text.rpartition(_END_OF_MESSAGE)
    if not found:
        raise ValueError("it leaves out the last message, which the answer is to go on with")
    # If the template stripped the blank after the mark, it would have stripped the content's own blanks, too.
    return begun if rest.startswith(" ") else begun.rstrip()


def check_templates(tokenizer: Any) -> None:
    """Raise ConfigError for a chat template that can't be parsed, or that exceeds the limits on a one-word message."""
    templates = tokenizer.chat_template or {}
    for template in templates.values() if isinstance(templates, Mapping) else [templates]:
        if len(template) > MOST_TEMPLATE_CHARACTERS:
            raise ConfigError(
                f"the chat template has {len(template):,} characters, over the limit of {MOST_TEMPLATE_CHARACTERS:,}"
            )
        try:
            render_chat(tokenizer, [{"role": "user", "content": "Hi"}], chat_template=template)
        except (TooMuch, SyntaxError, RecursionError, MemoryError) as error:
            raise ConfigError(f"the chat template can't be used: {one_line(error)}") from error
        except TemplateError as error:
            if hasattr(error, "lineno"):
                raise ConfigError(
                    f"the chat template has a mistake in line {error.lineno}: {one_line(error)}"
                ) from error
        except Exception:
            continue  # The template may need other messages.


@lru_cache(maxsize=32)
def _limited(template: str) -> nodes.Template:
    """The template's syntax tree, with its operations replaced by calls of this module's functions."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers accepts a tree instead of a text, because Jinja's `from_string` accepts both.
    environment = _compile_jinja_template("").environment
    limited: nodes.Template = _Limiter(environment.filters).visit(environment.parse(template))
    return limited


class _Limiter(NodeTransformer):
    """Replaces a template's operations by calls of the functions below."""

    def __init__(self, filters: Container[str]) -> None:
        self._filters = filters

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _counted("each", node.iter)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        node.args = [nodes.ContextReference(), node.node, *node.args]
        node.node = _function("call")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.name not in self._filters:
            return node  # Compiling the template reports it.
        if node.node is None:  # A filter block: its text is counted where it is put out.
            node.args = [_counted("small", argument) for argument in node.args]
            return node
        counted = _counted(
            "filtered", nodes.ContextReference(), nodes.Const(node.name), node.node, *node.args
        )
        keywords: Any = node.kwargs
        counted.kwargs, counted.dyn_args, counted.dyn_kwargs = keywords, node.dyn_args, node.dyn_kwargs
        return counted

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _counted("emitted", nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part)
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _counted("joined", *node.nodes)

    def _visit_operator(self, node: nodes.BinExpr) -> nodes.Node:
        self.generic_visit(node)
        return _counted(type(node).__name__.lower(), node.left, node.right)

    visit_Add = visit_Mul = visit_Mod = visit_Pow = _visit_operator

    def _visit_literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        # A tuple of names that is assigned to stays as it is.
        return node if getattr(node, "ctx", "load") != "load" else _counted("built", node)

    visit_List = visit_Dict = visit_Tuple = _visit_literal


def _function(name: str) -> nodes.ImportedName:
    return nodes.ImportedName(f"{__name__}.{name}")


def _counted(name: str, *arguments: nodes.Node) -> nodes.Call:
    return nodes.Call(_function(name), list(arguments), [], None, None)


# --- the functions that templates call


def each(items: Any) -> Iterable[Any]:
    """The items of a loop, counted."""
    return _SizedItems(items) if isinstance(items, Sized) else _Items(items)


class _Items:
    """Items that are counted as they are taken."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for item in self._items:
            budget.step()
            yield item


class _SizedItems(_Items):
    """Counted items with a length, which `loop.length` needs."""

    def __len__(self) -> int:
        return len(self._items)


def call(context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A call of a function or method."""
    if function is generate_lorem_ipsum:
        raise TooMuch("it asks for random text (lipsum)")
    _check_arguments(getattr(function, "__name__", ""), getattr(function, "__self__", None), args, kwargs)
    environment = context.environment
    assert isinstance(environment, SandboxedEnvironment), "transformers renders templates in no other"
    return _measured(environment.call(context, function, *args, **kwargs))


def filtered(context: Context, name: str, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """A filter."""
    if name not in _SHALLOW:
        _budget.get().grow(_size(value) if isinstance(value, list | tuple | dict) else 0)
    _check_arguments(name, value, args, kwargs)
    return _measured(
        context.environment.call_filter(name, value, args, kwargs, context=context, eval_ctx=context.eval_ctx)
    )


def emitted(value: Any) -> str:
    """Text that is put out, or captured by a block."""
    text = _text(value)
    _budget.get().grow(len(text))
    return text


def joined(*parts: Any) -> str:
    """`a ~ b`."""
    texts = [_text(part) for part in parts]
    _budget.get().grow(sum(map(len, texts)))
    return "".join(texts)


def built(value: Any) -> Any:
    """A list, tuple or mapping that the template writes out."""
    _budget.get().grow(_size(value))
    return value


def small(value: Any) -> Any:
    """An argument that may say how much of something to make."""
    if isinstance(value, int) and abs(value) > _ARGUMENT:
        raise TooMuch(f"it has an argument over {_ARGUMENT:,}")
    return value


def add(left: Any, right: Any) -> Any:
    """`a + b`."""
    _budget.get().step()
    if isinstance(left, str | list | tuple) and isinstance(right, Sized):
        _budget.get().grow(len(left) + len(right))
    return left + right


def mul(left: Any, right: Any) -> Any:
    """`a * b`."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            _budget.get().grow(len(sequence) * max(0, count))
    _check_digits(left, right)
    return left * right


def pow(left: Any, right: Any) -> Any:
    """`a ** b`."""
    _budget.get().step()
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _DIGITS:
        raise TooMuch("it computes with numbers without bounds")
    return left**right


def mod(left: Any, right: Any) -> Any:
    """`a % b`, which may format text."""
    if isinstance(left, str):
        _check_format(left)
        _budget.get().grow(len(left) + len(_text(right)))
    return left % right


def _check_arguments(name: str, of: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count a call of the method or filter `name` of the value `of`, and refuse it if its result may be too large."""
    budget = _budget.get()
    budget.step()
    values = [*args, *kwargs.values()]
    for value in values:
        small(value)
    if name not in _GROWING:
        return
    if name == "format" and isinstance(of, str):
        _check_format(of)
    arguments = values[1:] if name == "map" else values
    if name == "join" and isinstance(of, str):  # A string's method, whose argument is what is joined.
        of, arguments = values, [of]
    longest = max((value if isinstance(value, int) else _size(value) for value in arguments), default=0)
    if (_size(of) + 1) * (longest + 1) > _CHARACTERS:
        raise TooMuch(f"{name} may make more than {_CHARACTERS:,} characters of text")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TooMuch("it formats to a width without bounds")


def _check_digits(*numbers: Any) -> None:
    _budget.get().step()
    if sum(number.bit_length() for number in numbers if isinstance(number, int)) > _DIGITS:
        raise TooMuch("it computes with numbers without bounds")


def _measured(value: Any) -> Any:
    if isinstance(value, str):
        _budget.get().grow(len(value))
    elif isinstance(value, list | tuple | dict):
        _budget.get().step(len(value))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        _budget.get().grow(_size(value))
    return str(value)


def _size(value: Any) -> int:
    """Characters and items of a value, nested ones included."""
    left, size, budget = [value], 0, _budget.get()
    while left:
        item = left.pop()
        size += 1
        budget.items -= 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, Namespace):
            left += object.__getattribute__(item, "_Namespace__attrs").values()
        if len(left) > budget.items:
            raise TooMuch(f"it looks at more than {_ITEMS:,} items of lists")
    return size
