"""Rows and prompts become requests, and what the API would refuse is refused first."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import BatchInputError, RequestError
from airflow_provider_batchkit.request.block import PreparedRequest, RequestBlock
from airflow_provider_batchkit.request.build import (
    RequestBuilder,
    RequestDefaults,
    check_custom_id,
    encode_params,
    params_digest,
    refuse_repeated_ids,
)
from airflow_provider_batchkit.request.template import Row, RowTemplate
from airflow_provider_batchkit.source.keys import encode_key, encode_keys, key_values
from airflow_provider_batchkit.source.rows import Rows

DEFAULTS = RequestDefaults("claude-haiku-5-5", 100)
HELLO = [{"role": "user", "content": "hello"}]


def build(item: Any, position: int = 0, **kwargs: Any) -> PreparedRequest:
    return RequestBuilder(kwargs.pop("defaults", DEFAULTS), **kwargs).build(item, position)


def prompt(text: str, **context: Any) -> RowTemplate:
    return RowTemplate(text, name="prompt", context=context)


def test_a_bare_prompt_is_known_by_its_position() -> None:
    """A string becomes one user message under item-<position>."""
    request = build("Name a river.", 7)
    body = json.loads(request.body)
    assert body["custom_id"] == "item-7"
    assert body["params"] == {"model": "claude-haiku-5-5", "max_tokens": 100, "messages": [{"role": "user", "content": "Name a river."}]}
    assert key_values(request.key) == ["7"]


def test_a_native_request_keeps_its_id_and_its_own_params_win() -> None:
    """Defaults fill what a native request leaves out, and nothing else."""
    request = build({"custom_id": "a-1", "params": {"messages": HELLO, "max_tokens": 5}})
    body = json.loads(request.body)
    assert body == {"custom_id": "a-1", "params": {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": HELLO}}
    assert key_values(request.key) == ["a-1"]


def test_in_a_journaled_job_the_custom_id_names_job_and_question() -> None:
    """The same question has the same custom_id whatever its row, and another question another one."""
    builder = RequestBuilder(DEFAULTS, job_id="0123456789abcdef0123", key=["sku"], prompt=prompt("About {{ row.name }}"))
    one, same, other = (builder.build({"sku": s, "name": n}, 0) for s, n in [("A", "tea"), ("B", "tea"), ("C", "cup")])
    assert one.custom_id == same.custom_id != other.custom_id
    assert one.key == '["A"]' and same.key == '["B"]'
    assert one.custom_id.startswith("0123456789abcdef0123-") and len(one.custom_id) == 61


def test_without_dedupe_each_key_asks_for_itself() -> None:
    """dedupe=False gives equal questions of different rows different ids."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku"], prompt=prompt("About {{ row.name }}"), dedupe=False)
    one, two = (builder.build({"sku": s, "name": "tea"}, 0) for s in "AB")
    assert one.custom_id != two.custom_id
    assert json.loads(one.body)["params"] == json.loads(two.body)["params"]


def test_the_order_of_params_does_not_change_the_digest() -> None:
    """Equal params are the same question however the mapping was made."""
    one = build({"params": {"messages": HELLO, "temperature": 0.5, "top_k": 3}}, job_id="0" * 20)
    two = build({"params": {"top_k": 3, "temperature": 0.5, "messages": HELLO}}, job_id="0" * 20)
    assert one.custom_id == two.custom_id


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"custom_id": "a b", "params": {"messages": HELLO}}, r"request 3 \('a b'\): custom_id 'a b' is not valid: 1 to 64 letters"),
        ({"custom_id": "x" * 65, "params": {"messages": HELLO}}, "is not valid"),
        ({"custom_id": "a\n", "params": {"messages": HELLO}}, "is not valid"),
        ({"custom_id": "a", "params": {}}, r"request 3 \('a'\): no messages"),
        ({"custom_id": "a", "params": {"messages": []}}, "no messages"),
        ({"custom_id": "a", "params": {"messages": "hello"}}, "no messages"),
        ({"custom_id": "a", "params": {"messages": [{"role": "user", "content": " "}]}}, r"messages\[0\] has no content"),
        ({"custom_id": "a", "params": {"messages": [{"role": "robot", "content": "x"}]}}, r"messages\[0\] needs a role"),
        ({"custom_id": "a", "params": {"messages": HELLO, "max_tokens": 0}}, "max_tokens must be a whole number of at least 1, not 0"),
        (
            {"custom_id": "a", "params": {"messages": HELLO, "max_tokens": True}},
            "max_tokens must be a whole number of at least 1, not True",
        ),
        ({"custom_id": "a", "params": {"messages": HELLO, "stream": True}}, "'stream' is not possible in a batch"),
        ({"custom_id": "a", "params": {"messages": HELLO, "speed": "fast"}}, "speed 'fast' is not possible in a batch"),
        ({"custom_id": "a", "params": {"messages": HELLO, "model": ""}}, "no model"),
        ({"custom_id": "a", "params": {"messages": HELLO, "metadata": object()}}, "params cannot be written as JSON"),
        ({"custom_id": "a", "params": [], "x": 1}, "unknown fields"),
        ({"custom_id": "a", "params": "x"}, "params must be a mapping, not str"),
        ({"name": "tea"}, "a row mapping needs the parameter prompt"),
        (5, "a request is a mapping or a string, not int"),
        ("  ", r"messages\[0\] has no content"),
    ],
)
def test_what_the_api_would_refuse_is_refused_with_the_item_named(item: Any, message: str) -> None:
    """Each refusal names the item, says what is wrong, and that nothing was sent."""
    with pytest.raises(BatchInputError, match=message) as error:
        build(item, 3)
    assert "Nothing was sent" in str(error.value)
    assert "request 3" in str(error.value)


def test_a_missing_max_tokens_is_refused() -> None:
    """The API has no default for max_tokens, so neither have we."""
    with pytest.raises(RequestError, match="max_tokens must be a whole number of at least 1, not None"):
        build("hello", defaults=RequestDefaults("claude-haiku-5-5"))


def test_a_repeated_custom_id_is_refused_by_name() -> None:
    """One answer would overwrite the other."""
    requests = [build({"custom_id": c, "params": {"messages": HELLO}}) for c in ("a", "b", "a")]
    with pytest.raises(RequestError, match="request 2: custom_id 'a' came before"):
        list(refuse_repeated_ids([RequestBlock.of(requests[:2]), RequestBlock.of(requests[2:])]))


def test_a_missing_column_is_an_error_that_names_it() -> None:
    """A template that asks for a column that the row has not must not send an empty hole."""
    with pytest.raises(RequestError, match=r"row 4 \(sku='A'\): the prompt template .*'nam'.* Columns of the row: sku, name"):
        build({"sku": "A", "name": "tea"}, 4, key=["sku"], prompt=prompt("About {{ row.nam }}"))


def test_columns_hide_the_methods_of_a_mapping() -> None:
    """Columns called items, keys or count are columns; without such a column the name is missing, not a method."""
    row = Row({"items": 3, "count": "many"})
    assert prompt("{{ row.items }} {{ row.count }} {{ row['items'] }}").render(row) == "3 many 3"
    with pytest.raises(RequestError, match="keys"):
        prompt("{{ row.keys }}").render(row)


def test_null_renders_as_nothing_and_the_run_context_is_there() -> None:
    """A NULL column is an empty string in the prompt; ds and friends come from the task's context."""
    assert prompt("[{{ row.a }}] {{ ds }}", ds="2026-11-23").render({"a": None}) == "[] 2026-11-23"


def test_templates_are_sandboxed() -> None:
    """A template cannot reach into Python."""
    with pytest.raises(RequestError):
        prompt("{{ row.a.__class__.__mro__ }}").render({"a": "x"})


def test_a_broken_template_fails_before_any_row() -> None:
    """Jinja syntax errors come at once and say where."""
    with pytest.raises(BatchInputError, match="The prompt template is not valid Jinja"):
        prompt("{{ row.a ")


def test_row_templates_may_loop_over_columns() -> None:
    """Iterating a row gives its columns."""
    assert prompt("{% for c in row %}{{ c }}={{ row[c] }};{% endfor %}{{ row | tojson }}").render({"a": 1}) == 'a=1;{"a": 1}'


def test_a_system_template_is_rendered_by_row() -> None:
    """The system prompt may differ by row."""
    system = RowTemplate("Speak {{ row.lang }}.", name="system")
    request = build({"id": 1, "lang": "French"}, key=["id"], prompt=prompt("hi"), system=system)
    assert json.loads(request.body)["params"]["system"] == "Speak French."


def test_keys_of_every_usual_type_survive() -> None:
    """Key values become JSON and come back in a form that the column's type reads."""
    values = [1, "é\u2028", decimal.Decimal("1.10"), dt.date(2026, 1, 2), dt.datetime(2026, 1, 2, 3, tzinfo=dt.UTC), True]
    assert key_values(encode_key(values)) == [1, "é\u2028", "1.1", "2026-01-02", "2026-01-02T03:00:00Z", True]


def test_equal_numbers_are_one_key_with_all_its_digits() -> None:
    """Python's decimal context would round to 28 digits, and the two zeros of a float are equal in SQL."""
    nines = "9" * 38
    numbers = [nines, f"{nines}.{nines}0", "-0.00", "1E+2", "100.0", f"-1E-{38}"]
    assert [key_values(encode_key([decimal.Decimal(n)])) for n in numbers] == [
        [nines], [f"{nines}.{nines}"], ["0"], ["100"], ["100"], ["-0." + "0" * 37 + "1"],
    ]  # fmt: skip
    assert encode_keys([[0.0, -0.0]]) == ["[0.0]", "[0.0]"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it is NULL"),
        (object(), "cannot be a key"),
        (float("nan"), "not a number"),
        (2**70, "64 bits"),
        (b"x", "cast it to text"),
        ("a\0b", "a NUL character"),
        (decimal.Decimal("Infinity"), "not a number"),
        (dt.datetime(9999, 12, 31, 23, tzinfo=dt.timezone(dt.timedelta(hours=-5))), "cannot be a key"),
        ("x" * 3000, "over the limit of 2,000"),
    ],
)
def test_a_key_that_cannot_tell_rows_apart_is_refused(value: Any, message: str) -> None:
    """NULL and values without a JSON form are no keys."""
    with pytest.raises(RequestError, match=message):
        encode_key([value])


def test_a_key_column_that_is_not_in_the_source_is_named() -> None:
    """A typo in key is found at the first row."""
    with pytest.raises(RequestError, match=r"key column skU is not in the source\. Columns: sku"):
        build({"sku": "A"}, key=["skU"], prompt=prompt("x"))


def test_check_custom_id_takes_the_longest_that_the_api_takes() -> None:
    """64 characters of the allowed set pass."""
    assert check_custom_id("aZ0_-" + "x" * 59) == "aZ0_-" + "x" * 59


@pytest.mark.parametrize("system", ["Sold at {{ row.shop }}.", 'The same, "always".'])
@pytest.mark.parametrize("ttl", [None, "5m", "1h"])
def test_a_system_prompt_is_part_of_the_params_as_they_are_encoded_whole(system: str, ttl: str | None) -> None:
    """The fast way, the careful one, and the canonical JSON of the same params agree; the marker is part of the digest."""
    defaults = RequestDefaults("claude-haiku-5-5", 100, params={"temperature": 0, "tools": []}, cache_system=ttl)
    builder = RequestBuilder(defaults, job_id="0" * 20, key=["sku"], prompt=prompt("{{ row.name }}"), system=prompt(system))
    rows = [{"sku": s, "name": f"tea {s}", "shop": shop} for s, shop in (("A", "x"), ("B", "x"), ("C", "é"), ("D", "x"))]
    requests = builder.build_all(rows, 7)
    assert list(requests) == [builder.build(row, 7 + i) for i, row in enumerate(rows)]
    for request, row in zip(requests, rows, strict=True):
        text: Any = system.replace("{{ row.shop }}", row["shop"])
        if ttl is not None:
            text = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": ttl}}]
        messages = [{"role": "user", "content": row["name"]}]
        params = {"model": "claude-haiku-5-5", "max_tokens": 100, "temperature": 0, "tools": [], "system": text, "messages": messages}
        custom_id = f"{'0' * 20}-{params_digest(encode_params(params))}"
        assert (request.custom_id, request.key) == (custom_id, encode_key([row["sku"]]))
        assert request.body == b'{"custom_id":"%b","params":%b}' % (custom_id.encode(), encode_params(params))


def test_rows_built_together_are_the_same_requests() -> None:
    """The fast way for many rows and the careful one for a single row give the same bytes."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku", "n"], prompt=prompt("{{ row.name }} 100% {{ row['n'] }}"))
    rows = [{"sku": "A", "n": 1, "name": 't\u2028 "é'}, {"sku": "B", "n": decimal.Decimal("2.50"), "name": None}]
    assert list(builder.build_all(rows, 7)) == [builder.build(row, 7 + i) for i, row in enumerate(rows)]
    assert json.loads(builder.build(rows[1], 0).body)["params"]["messages"][0]["content"] == " 100% 2.50"


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("{{ row.name }} 100% {{ row['n'] }}", None),
        ("no column, 100%", "{{ row.name }}"),
        ("{{ row.name | default('?', true) | upper }}", "{{ row.n }}"),
    ],
)
def test_rows_of_a_query_are_the_same_requests_as_mappings(text: str, system: str | None) -> None:
    """Columns are passed on as they came where nothing needs a row as such."""
    builder = RequestBuilder(
        DEFAULTS, job_id="0" * 20, key=["sku", "n"], prompt=prompt(text), system=None if system is None else prompt(system)
    )
    rows = Rows(["sku", "n", "name"], [("A", 1, "tea"), ("B", 2, None), ("C", 3, ""), ("D", 4, decimal.Decimal("1.50"))])
    mappings = [{"sku": "A", "n": 1, "name": "tea"}, {"sku": "B", "n": 2, "name": None}, *rows[2:]]
    assert list(builder.build_all(rows, 7)) == [builder.build(row, 7 + i) for i, row in enumerate(mappings)]
    with pytest.raises(RequestError, match=r"row 8 \(sku='B', n=None\): a key column cannot be a key: it is NULL"):
        builder.build_all(Rows(["sku", "n", "name"], [("A", 1, "tea"), ("B", None, "cup")]), 7)
    with pytest.raises(RequestError, match=r"row 7: key column sku, n is not in the source\. Columns: name"):
        builder.build_all(Rows(["name"], [("tea",)]), 7)


@pytest.mark.parametrize(
    "column",
    [
        [1, 2, -(2**63), 2**63 - 1],
        ["a", 'quo"te', "new\nline", "é\u2028", ""],
        [True, 1, "1", decimal.Decimal("1.50")],
        [dt.datetime(2026, 11, 23, 12, tzinfo=dt.timezone(dt.timedelta(hours=2))), dt.date(2026, 11, 23)],
        ["x" * 600, "x" * 1900],
        ["\\u0000", "a"],
    ],
)
def test_keys_of_many_rows_are_the_keys_of_each(column: list[Any]) -> None:
    """Alone or in two columns."""
    assert encode_keys([column]) == [encode_key([value]) for value in column]
    numbers = list(range(len(column)))
    assert encode_keys([column, numbers]) == [encode_key(row) for row in zip(column, numbers, strict=True)]


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, None, "x" * 2000, "é" * 999, 1e400, "a\0b"])
def test_one_bad_key_among_many_is_refused(bad: Any) -> None:
    """As it is alone."""
    with pytest.raises(RequestError):
        encode_keys([[bad]])
    same = 1 if isinstance(bad, int) else "a"
    with pytest.raises(RequestError):
        encode_keys([[same, bad, same]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sku": None, "name": "tea"}, r"row 8 \(sku=None\): a key column cannot be a key: it is NULL"),
        ({"sku": "B"}, r"row 8 \(sku='B'\): the prompt template .*'name'"),
        ({"sku": "B", "name": ""}, r"row 8 \(sku='B'\): messages\[0\] has no content"),
        ({"sku": "B", "name": "\ud800"}, r"row 8 \(sku='B'\): params cannot be written as JSON"),
        ({"name": "tea"}, "row 8: key column sku is not in the source"),
        ("tea", "request 8: a prompt string has no columns"),
        (5, "request 8: a request is a mapping or a string, not int"),
    ],
)
def test_a_bad_row_among_many_is_named(row: Any, message: str) -> None:
    """Rows are built some hundred at a time; the error is about the one."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku"], prompt=prompt("{{ row.name }}"))
    with pytest.raises(RequestError, match=message):
        builder.build_all([{"sku": "A", "name": "tea"}, row, {"sku": "C", "name": "cup"}], 7)


@pytest.mark.parametrize(
    "text", ["{{ row.a }}-{{ row['b'] }}%s", "{% raw %}{{ x }}{% endraw %}{{ row.a }}\n", "plain 100%", "{{ row.items }}"]
)
def test_a_simple_template_gives_what_jinja_gives(text: str) -> None:
    """Text and columns are put together without Jinja, to the same letter."""
    row = {"a": 1.50, "b": None, "items": [1, "x"]}
    slow = RowTemplate("{% if true %}" + text + "{% endif %}", name="prompt").render(row)
    assert prompt(text).render(row) == slow


def test_large_rows_are_built_few_at_a_time() -> None:
    """Memory is for some megabytes of them, whatever their number; small ones come by the hundred."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku"], prompt=prompt("{{ row.name }}"))
    for size, at_most in ((10, 512), (500_000, 8)):
        seen: list[Any] = []
        sizes = [len(piece) for piece in builder.pieces(({"sku": i, "name": "x" * size} for i in range(1500)), seen.extend)]
        assert sum(sizes) == 1500 and max(sizes) == at_most
        assert [row["sku"] for row in seen] == list(range(1500))
    assert sizes[-2:] == [4, 4]


def test_rows_of_mixed_sizes_are_built_few_at_a_time() -> None:
    """The largest decides: a small one at the end of a piece says nothing of the next."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku"], prompt=prompt("{{ row.name }}"))
    rows = ({"sku": i, "name": "x" * (500_000 if i % 4 == 0 else 10)} for i in range(400))
    held = [sum(len(request.body) for request in piece) for piece in builder.pieces(rows)]
    assert max(held) < 3_000_000


def test_a_system_prompt_that_cannot_be_sent_is_named_and_no_other_takes_its_place() -> None:
    """Rows share the encoded system prompt of the row before while it is the same; a bad one is not the same."""
    builder = RequestBuilder(DEFAULTS, job_id="0" * 20, key=["sku"], prompt=prompt("{{ row.name }}"), system=prompt("For {{ row.who }}."))
    builder.build_all([{"sku": i, "name": "tea", "who": "A"} for i in range(3)], 0)
    bad = {"sku": 3, "name": "tea", "who": "B \udcff"}
    for _ in range(2):
        with pytest.raises(RequestError, match=r"row 3 \(sku=3\): params cannot be written as JSON"):
            builder.build_all([bad], 3)
    (after,) = builder.build_all([{"sku": 4, "name": "tea", "who": "A"}], 4)
    assert json.loads(after.body)["params"]["system"] == "For A."
    assert not builder.build_all([], 5)
