"""Row templates: Jinja over the columns of a row, compiled once for all rows.

Most prompts only put columns into a text. Those are filled in by one ``%`` of Python, twenty times as fast as a call of Jinja;
whatever does more (filters, loops, conditions) goes through Jinja itself, with the same result for every row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.source.rows import column_of


class Row(dict[str, Any]):
    """A source row for templates: ``row.column`` and ``row["column"]`` are the column, also one called ``items`` or ``count``."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self, name)
        except KeyError:
            if name.startswith("__"):
                return dict.__getattribute__(self, name)
            raise AttributeError(name) from None


def _dumps(value: Any, **kwargs: Any) -> str:
    return json.dumps({c: value[c] for c in value} if type(value) is Row else value, **kwargs)


class RowTemplate:
    """A compiled row template: Jinja, sandboxed and strict, over ``row`` and whatever ``context`` gives once per run.

    A NULL prints as nothing; in an expression it is Jinja's none: ``row.a | default("", true) | upper``. A missing column raises
    :class:`RequestError` that names it.
    """

    def __init__(self, text: str, *, name: str, context: Mapping[str, Any] | None = None) -> None:
        """:param name: what the template is called in errors, e.g. ``prompt``"""
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined,
            autoescape=False,
            keep_trailing_newline=True,
            finalize=lambda value: "" if value is None else value,
        )
        environment.policies["json.dumps_function"] = _dumps
        self._name = name
        try:
            self._template = environment.from_string(text, globals=dict(context or {}))
            self._filler = _Filler.of(environment.parse(text))
        except TemplateError as e:
            raise BatchInputError(f"The {name} template is not valid Jinja: {e}. Nothing was sent.") from e

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """:meth:`render` for each of ``rows``."""
        if self._filler is not None:
            try:
                return self._filler.fill_all(rows)
            except KeyError:
                pass  # Jinja says which column is missing
        return [self.render(row) for row in rows]

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for one row.

        :raises RequestError: when the template asks for what the row has not, or fails
        """
        if self._filler is not None:
            try:
                return self._filler.fill_all([row])[0]
            except KeyError:
                pass  # Jinja says which column is missing
        try:
            return self._template.render(row=row if type(row) is Row else Row(row))
        except UndefinedError as e:
            columns = ", ".join(map(str, row)) or "none"
            raise RequestError(
                f"the {self._name} template uses something that is not there: {e.message}. Columns of the row: {columns}. Nothing was sent."
            ) from e
        except Exception as e:
            raise RequestError(f"the {self._name} template failed: {type(e).__name__}: {e}. Nothing was sent.") from e


class _Filler:
    """A template that is nothing but text and columns."""

    def __init__(self, form: str, columns: list[str]) -> None:
        """:param form: a ``%`` form with one ``%s`` for each of ``columns``"""
        self._form = form
        self._columns = tuple(columns)

    def fill_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """:raises KeyError: for a column that a row has not"""
        if not self._columns:
            return [self._form % ()] * len(rows)
        columns = [_without_null(column_of(rows, name)) for name in self._columns]
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


def _without_null(values: Sequence[Any]) -> Sequence[Any]:
    """A NULL prints as nothing."""
    return ["" if value is None else value for value in values] if NoneType in set(map(type, values)) else values


def _column(node: nodes.Node) -> str | None:
    """The column that an expression is, as in ``row.name`` and ``row["name"]``; None for any other."""
    match node:
        # the sandbox has a say in attributes with an underscore
        case nodes.Getattr(node=nodes.Name(name="row"), attr=str(attr)) if not attr.startswith("_"):
            return attr
        case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=str(item))):
            return item
    return None
