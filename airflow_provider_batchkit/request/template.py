"""Row templates: Jinja over the columns of a row, compiled once for all rows.

Most prompts only put columns into a text. One ``%`` of Python fills these in, twenty times as fast as a call of Jinja. Other templates
(filters, loops, conditions) go through Jinja itself. Both ways write a value as the text of
:func:`~airflow_provider_batchkit.request.texts.text_of`, so the result is the same for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import wraps
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError, UndefinedError, nodes, pass_environment
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.request.system import SystemBlocks
from airflow_provider_batchkit.request.texts import NoTextError, json_of, text_of, texts_of
from airflow_provider_batchkit.source.rows import column_of


class Row(dict[str, Any]):
    """A source row for templates. ``row.column`` and ``row["column"]`` are the column, even one called ``items`` or ``count``."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self, name)
        except KeyError:
            if name.startswith("__"):
                return dict.__getattribute__(self, name)
            raise AttributeError(name) from None


#: filters of Jinja whose first argument is text, and which apply ``str`` to anything else
_TEXT_FILTERS = (
    "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "replace", "string", "striptags", "title", "trim",
    "truncate", "upper", "urlize", "wordcount", "wordwrap",
)  # fmt: skip
_TEXT = "batchkit_text"


class _RowEnvironment(ImmutableSandboxedEnvironment):
    """Jinja with the texts of :func:`text_of` for values that are printed, joined, formatted, or given to a filter of texts."""

    intercepted_binops = frozenset({"%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=text_of)
        for name in _TEXT_FILTERS:
            self.filters[name] = _taking_text(self.filters[name])
        self.filters |= {_TEXT: text_of, "format": _format, "join": _join, "tojson": _tojson}

    def template(self, text: str) -> nodes.Template:
        """The parsed template; operands of ``~`` are written as text, too."""
        tree = self.parse(text)
        for node in tree.find_all(nodes.Concat):
            node.nodes = [nodes.Filter(part, _TEXT, [], [], None, None) for part in node.nodes]
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            if isinstance(right, Mapping) and "%(" in left:
                right = _Formatted({name: right[name] for name in right})
            else:
                right = tuple(map(_formatted, right)) if isinstance(right, tuple) else _formatted(right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form, takes_mapping = value.__self__, value.__name__ == "format_map"

        def format_(*args: Any, **named: Any) -> str:
            return _Formatter(self).vformat(form, () if takes_mapping else args, args[0] if takes_mapping else named)

        return format_


class _Formatter(SandboxedFormatter):
    """``str.format`` that writes a value as its text, unless a format specification is given."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        return super().format_field(value, format_spec) if format_spec else text_of(value)


def _taking_text(found: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja that gets the text of its first argument."""
    first = 1 if hasattr(found, "jinja_pass_arg") else 0

    @wraps(found)
    def taking_text(*args: Any, **kwargs: Any) -> Any:
        return found(*args[:first], text_of(args[first]), *args[first + 1 :], **kwargs)

    return taking_text


def _format(form: Any, *values: Any, **named: Any) -> str:
    return text_of(form) % (_Formatted(named) or tuple(map(_formatted, values)))


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    parts = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return text_of(d).join(map(text_of, parts))


def _tojson(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys, as Jinja's own filter writes it, but without that filter's escapes for HTML."""
    return json_of(value, indent=indent, sort_keys=True)


class _Formatted(dict[str, Any]):
    """Named values for Python's ``%``."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        return _formatted(super().__getitem__(name))


def _formatted(value: Any) -> Any:
    """A value for Python's ``%``. A number stays a number for ``%05.1f``; other values become their text."""
    return value if isinstance(value, int | float | Decimal) else text_of(value)


class RowTemplate:
    """A compiled row template: Jinja, sandboxed and strict, over ``row`` and the values that ``context`` gives once per run.

    Values become text as :mod:`~airflow_provider_batchkit.request.texts` says. NULL prints as nothing; in an expression it is Jinja's none:
    ``row.a | default("", true) | upper``. A missing column raises :class:`RequestError` that names it.
    """

    def __init__(self, text: str, *, name: str, context: Mapping[str, Any] | None = None) -> None:
        """:param name: the template's name in errors, e.g. ``prompt``"""
        environment = _RowEnvironment()
        self._name = name
        try:
            tree = environment.template(text)
            self._filler = _Filler.of(tree)
            self._template = environment.from_string(tree, globals=dict(context or {}))
        except TemplateError as e:
            raise BatchInputError(f"The {name} template is not valid Jinja: {e}. Nothing was sent.") from e

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The same as :meth:`render`, for each of ``rows``."""
        if self._filler is not None:
            try:
                return self._filler.fill_all(rows)
            except (KeyError, NoTextError):
                pass  # rendering one row at a time gives a better error
        return [self.render(row) for row in rows]

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for one row.

        :raises RequestError: the row lacks a column of the template, a value has no text, or the template fails
        """
        try:
            if self._filler is not None:
                try:
                    return self._filler.fill_all([row])[0]
                except KeyError:
                    pass  # Jinja names the missing column
            return self._template.render(row=row if type(row) is Row else Row(row))
        except NoTextError as e:
            column = next((name for name in row if _holds(row[name], e.value)), None)
            what = "a value" if column is None else f"the column {column}"
            raise RequestError(
                f"the {self._name} template cannot write {what}: {e}. Leave it out of the template, "
                f"or make it text in the source: for bytes in PostgreSQL, convert_from({column or '…'}, 'UTF8') or "
                f"encode({column or '…'}, 'hex'). Nothing was sent."
            ) from e
        except UndefinedError as e:
            columns = ", ".join(map(str, row)) or "none"
            raise RequestError(
                f"the {self._name} template uses something that is not there: {e.message}. Columns of the row: {columns}. Nothing was sent."
            ) from e
        except Exception as e:
            raise RequestError(f"the {self._name} template failed: {type(e).__name__}: {e}. Nothing was sent.") from e


def _holds(value: Any, part: Any) -> bool:
    """Whether a column's value is ``part``, the value that has no text, or contains it somewhere."""
    if value is part:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_holds(one, part) for one in parts)


def system_template(
    system: str | Sequence[Mapping[str, Any]] | None, context: Mapping[str, Any] | None = None
) -> RowTemplate | SystemBlocks | None:
    """The templates of a system prompt, which is a text or content blocks."""
    if system is None or isinstance(system, str):
        return None if system is None else RowTemplate(system, name="system", context=context)
    return SystemBlocks.of(system, lambda text, name: RowTemplate(text, name=name, context=context))


class _Filler:
    """A template that has nothing but text and columns."""

    def __init__(self, form: str, columns: list[str]) -> None:
        """:param form: a ``%`` form with one ``%s`` for each of ``columns``"""
        self._form = form
        self._columns = tuple(columns)

    def fill_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """
        :raises KeyError: for a column that a row lacks
        :raises NoTextError: for a value that has no text
        """
        if not self._columns:
            return [self._form % ()] * len(rows)
        columns = [texts_of(column_of(rows, name)) for name in self._columns]
        return list(map(self._form.__mod__, zip(*columns, strict=True)))

    @classmethod
    def of(cls, template: nodes.Template) -> _Filler | None:
        """The filler of a parsed template; None when the template does more than that."""
        form: list[str] = []
        columns: list[str] = []
        for node in template.body:
            if not isinstance(node, nodes.Output):
                return None
            for part in node.nodes:
                column = _column(part)
                if isinstance(part, nodes.TemplateData):
                    form.append(part.data.replace("%", "%%"))
                elif column is not None:
                    form.append("%s")
                    columns.append(column)
                else:
                    return None
        return cls("".join(form), columns)


def _column(node: nodes.Node) -> str | None:
    """The column that an expression reads, as ``row.name`` and ``row["name"]`` do; None for any other expression."""
    match node:
        # attributes with an underscore are left to the sandbox
        case nodes.Getattr(node=nodes.Name(name="row"), attr=str(attr)) if not attr.startswith("_"):
            return attr
        case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=str(item))):
            return item
    return None
