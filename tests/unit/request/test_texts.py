"""The text of a value in a prompt: whatever its type, in whichever way the template writes it."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import json
import os
import subprocess
import sys
import uuid
from collections import OrderedDict, namedtuple
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults
from airflow_provider_batchkit.request.template import RowTemplate
from airflow_provider_batchkit.source.rows import Rows


class Size(enum.Enum):
    LARGE = "large"


class Rank(enum.IntEnum):
    FIRST = 1


class Shop(enum.StrEnum):
    MAIN = "main"


Point = namedtuple("Point", "x y")  # noqa: PYI024 # what psycopg makes of a composite type
_NOON = dt.datetime(2026, 1, 2, 12, 30, tzinfo=dt.timezone(dt.timedelta(hours=9)))

#: a value, and its text in a prompt
TEXTS: list[tuple[Any, str]] = [
    ("tea\u2028", "tea\u2028"), ("", ""), (None, ""), (True, "True"), (7, "7"), (10**30, "1" + "0" * 30),
    (1.5, "1.5"), (-0.0, "-0.0"), (1e-05, "0.00001"), (1e16, "10000000000000000"), (1e300, "1e+300"), (float("inf"), "inf"),
    (Decimal("1.50"), "1.50"), (Decimal("1E+2"), "100"), (Decimal("1E-10"), "0.0000000001"), (Decimal("NaN"), "NaN"),
    (dt.date(2026, 1, 2), "2026-01-02"), (dt.time(3, 4, 5), "03:04:05"), (_NOON, "2026-01-02T12:30:00+09:00"),
    (dt.datetime(2026, 1, 2, 3, 4, 5, 6000), "2026-01-02T03:04:05.006000"),  # noqa: DTZ001 # TIMESTAMP without a zone
    (dt.timedelta(days=400, hours=2, seconds=1.5), "P400DT2H1.5S"), (dt.timedelta(minutes=-5), "-PT5M"), (dt.timedelta(), "PT0S"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"), (ipaddress.ip_network("10.0.0.0/8"), "10.0.0.0/8"),
    (Size.LARGE, "large"), (Rank.FIRST, "1"), (Shop.MAIN, "main"),
    (Range(1, None, "[)"), "[1,)"), (Range(empty=True), "empty"), (Range(1, 5, "(]"), "(1,5]"),
    (Range(dt.date(2026, 1, 1), dt.date(2026, 2, 1)), "[2026-01-01,2026-02-01)"),
    (Multirange([Range(1, 3)]), '["[1,3)"]'),
    ({}, "{}"), ([], "[]"), ({"new": True, "old": None}, '{"new": true, "old": null}'),
    ({"名": "日本 <b>'&\"\\", "é": [1.50, "a\nb"]}, '{"名": "日本 <b>\'&\\"\\\\", "é": [1.5, "a\\nb"]}'),
    (OrderedDict(b=1, a=2), '{"b": 1, "a": 2}'),
    ({1: "a", None: "b", dt.date(2026, 1, 2): "c"}, '{"1": "a", "null": "b", "2026-01-02": "c"}'),
    ((1, "a"), '[1, "a"]'), (Point(1, 2), "[1, 2]"), ({3, 1, 2}, "[1, 2, 3]"), (frozenset({"b", "a"}), '["a", "b"]'),
    ([Decimal("1.50"), Decimal("1E+2"), 10**30, float("nan")], f"[1.50, 100, 1{'0' * 30}, null]"),
    ({"at": _NOON, "for": dt.timedelta(hours=1), "id": uuid.UUID(int=1), "size": Size.LARGE, "of": [dt.date(2026, 1, 2)]},
     ('{"at": "2026-01-02T12:30:00+09:00", "for": "PT1H", "id": "00000000-0000-0000-0000-000000000001", "size": "large", '
      '"of": ["2026-01-02"]}')),
    (np.int64(5), "5"), (np.float64(0.5), "0.5"), (np.bool_(True), "True"), (np.array([1.5, 2.0]), "[1.5, 2.0]"),
    (np.datetime64("2026-01-02T03:04:05", "ns"), "2026-01-02T03:04:05"), ([np.int64(5)], "[5]"),
    (np.array(["2026-01-02"], "M8[ns]"), '["2026-01-02T00:00:00"]'),
    (pa.scalar(3), "3"), (pa.scalar([1, None]), "[1, null]"),
]  # fmt: skip

#: ways in which a template writes a column
WAYS = {
    "printed": "{{ row.v }}",
    "by jinja": "{% if true %}{{ row.v }}{% endif %}",
    "in a block": "{% set text %}{{ row['v'] }}{% endset %}{{ text }}",
    "joined": "{{ row.v ~ '' }}",
    "listed": "{{ [row.v] | join(',') }}",
    "filtered": "{{ row.v | string }}",
    "replaced": "{{ row.v | replace('\u0000', '') }}",
    "formatted": "{{ '{}'.format(row.v) }}{{ '' % () }}",
    "mapped": "{{ '{v}'.format_map(row) }}",
}


def render(text: str, value: Any) -> str:
    return RowTemplate(text, name="prompt").render({"v": value})


@pytest.mark.parametrize("way", WAYS)
def test_a_value_has_one_text_wherever_a_template_writes_it(way: str) -> None:
    """JSON for what has no text of its own, ISO 8601 for times, no exponents where people write none."""
    assert [(value, render(WAYS[way], value)) for value, _ in TEXTS] == [(value, text) for value, text in TEXTS]


@pytest.mark.parametrize("form", ["{{ '%s' % row.v }}", "{{ '%s' % (row.v,) }}", "{{ '%(v)s' % row }}", "{{ '%s' | format(row.v) }}"])
def test_a_percent_form_writes_what_python_would_show_as_code_as_text(form: str) -> None:
    """Numbers stay numbers, so that a form can say how many digits there are."""
    for value, text in (({"new": True}, '{"new": true}'), (_NOON, "2026-01-02T12:30:00+09:00"), (None, ""), ("a", "a"), (7, "7")):
        assert render(form, value) == text
    assert render(form.replace("s'", "06.2f'").replace("%s", "%06.2f"), Decimal("1.5")) == "001.50"


def test_what_a_template_says_of_the_form_is_done() -> None:
    """Formats of dates and numbers, methods, parts of a JSON column, and JSON on request."""
    row = {"at": _NOON, "n": 2, "j": {"名": ["<b>", {"x": Decimal("1.50")}], "a": []}}
    for text, wanted in {
        "{{ row.at.strftime('%d.%m.') }} {{ '{:%H:%M}'.format(row.at) }} {{ '{:05.1f}'.format(row.n) }}": "02.01. 12:30 002.0",
        "{{ row.j['名'][1] }} {{ row.j.名 | first }} {{ row.j.items() | list }}": (
            '{"x": 1.50} <b> [["名", ["<b>", {"x": 1.50}]], ["a", []]]'
        ),
        "{{ row.j | tojson }}": '{"a": [], "名": ["<b>", {"x": 1.50}]}',
        "{{ row.j | tojson(indent=1) }}": '{\n "a": [],\n "名": [\n  "<b>",\n  {\n   "x": 1.50\n  }\n ]\n}',
        "{{ {'b': 1, 'a': '日'} | tojson(2) }}": '{\n  "a": "日",\n  "b": 1\n}',
        "{{ row }}": '{"at": "2026-01-02T12:30:00+09:00", "n": 2, "j": {"名": ["<b>", {"x": 1.50}], "a": []}}',
        "{{ row.j.a ~ row.n ~ '!' }} {{ 'x' ~ 1 }}": "[]2! x1",
    }.items():
        assert RowTemplate(text, name="prompt").render(row) == wanted, text


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.text()
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.none() | st.timezones())
    | st.timedeltas()
    | st.uuids()
    | st.sampled_from([Size.LARGE, Rank.FIRST, Shop.MAIN])
)
values = st.recursive(
    scalars,
    lambda part: (
        st.lists(part)
        | st.tuples(part, part)
        | st.dictionaries(st.text() | st.integers(), part)
        | st.sets(st.text() | st.integers() | st.dates())
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=6))
def test_the_fast_way_gives_the_bytes_of_jinja(column: list[Any]) -> None:
    """A column is written as a whole where a template only puts it in a text, and value by value by Jinja."""
    fast, slow = (RowTemplate(WAYS[way], name="prompt") for way in ("printed", "by jinja"))
    for rows in ([{"v": value} for value in column], Rows(["v"], [(value,) for value in column])):
        found = fast.render_all(rows)
        assert found == slow.render_all(rows) == [fast.render(row) for row in rows]
    for value, text in zip(column, found, strict=True):
        if isinstance(value, dict | list | tuple | set):
            json.loads(text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"x", r"it is binary \(bytes, 1 bytes\)"),
        (bytearray(b"xy"), r"binary \(bytearray, 2 bytes\)"),
        (memoryview(b"x"), r"binary \(memoryview, 1 bytes\)"),
        ({"a": [b"x"]}, "binary"),
        (object(), "prints as <object object at 0x.*another attempt would print differently"),
    ],
)
def test_what_has_no_text_is_refused_by_row_and_column(way: str, value: Any, why: str) -> None:
    """Before anything is sent, with what to do; also in a row among many."""
    builder = RequestBuilder(
        RequestDefaults("claude-haiku-5-5", 100), job_id="0" * 20, key=["sku"], prompt=RowTemplate(f"x {WAYS[way]}", name="prompt")
    )
    rows = Rows(["sku", "v"], [("A", "tea"), ("B", value), ("C", None)])
    with pytest.raises(RequestError, match=rf"row 8 \(sku='B'\): the prompt template cannot write the column v: .*{why}.*Nothing was sent"):
        builder.build_all(rows, 7)


def test_bytes_may_be_used_without_being_written() -> None:
    """Their length, their text in a known encoding, whether there are any."""
    assert render("{{ row.v | length }} {{ row.v.decode('utf-8') }}{% if row.v %}!{% endif %}", "é".encode()) == "2 é!"


def test_a_set_is_written_alike_by_every_process() -> None:
    """Python orders a set of texts anew in each process, and another order would be another question."""
    code = (
        "from airflow_provider_batchkit.request.template import RowTemplate\n"
        "print(RowTemplate('{{ row.v }}{{ row.v ~ 1 }}', name='p').render({'v': {'a', 'b', 'c', 'd'}}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True
        ).stdout
        for seed in range(4)
    }
    assert found == {'["a", "b", "c", "d"]["a", "b", "c", "d"]1\n'}
