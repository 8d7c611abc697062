"""System prompts of content blocks: their texts are templates, and everything else of them is sent as it is or refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.kit import BatchKit
from airflow_provider_batchkit.request.build import RequestBuilder, RequestDefaults, encode_params, params_digest
from airflow_provider_batchkit.request.params import ParamNames, check_params
from airflow_provider_batchkit.request.system import system_problem_of_task
from airflow_provider_batchkit.request.template import RowTemplate, system_template
from airflow_provider_batchkit.source.rows import Rows

HOUR = {"type": "ephemeral", "ttl": "1h"}
MINUTES = {"type": "ephemeral", "ttl": "5m"}
JOB = "0" * 20
LONG = "Answer in the house style. " * 40


def text(words: str, marker: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **({} if marker is None else {"cache_control": marker}), **more}


def builder(system: Any, **defaults: Any) -> RequestBuilder:
    return RequestBuilder(
        RequestDefaults("claude-haiku-5-5", 100, **defaults),
        job_id=JOB,
        key=["sku"],
        prompt=RowTemplate("{{ row.name }}", name="prompt"),
        system=system_template(system),
    )


ROWS = [{"sku": s, "name": f"tea {s}", "shop": shop} for s, shop in (("A", "x"), ("B", "x"), ("C", 'é "q"\u2028'), ("D", "x"))]


@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize(
    "system",
    [
        [text("Always the same.")],
        [text("{{ row.shop }}"), text("{{ row.shop | upper }}", MINUTES)],
        [text("Fixed, 100 %", HOUR), text("Sold at {{ row.shop }}.", None, citations=None), text("{% raw %}{{ as it is }}{% endraw %}")],
    ],
)
def test_each_text_is_rendered_and_the_rest_is_the_canonical_json(system: list[dict[str, Any]], as_rows: bool) -> None:
    """The fast way, the careful one, and the canonical JSON of the whole params agree, and so do the digests."""
    built = builder(system, params={"temperature": 0, "tools": []})
    items: Any = Rows(list(ROWS[0]), [tuple(row.values()) for row in ROWS]) if as_rows else ROWS
    requests = built.build_all(items, 7)
    assert list(requests) == [built.build(row, 7 + i) for i, row in enumerate(ROWS)]
    for request, row in zip(requests, ROWS, strict=True):
        blocks = [{**block, "text": RowTemplate(block["text"], name="t").render(row)} for block in system]
        params = {
            "model": "claude-haiku-5-5", "max_tokens": 100, "temperature": 0, "tools": [], "system": blocks,
            "messages": [{"role": "user", "content": row["name"]}],
        }  # fmt: skip
        assert request.params == encode_params(params)
        assert request.custom_id == f"{JOB}-{params_digest(encode_params(params))}"


def test_requests_with_a_system_prompt_of_text_keep_their_ids() -> None:
    """What a ledger of an earlier release has journaled is known again: these ids were written by that release."""
    plain = builder("Sold at {{ row.shop }}.", params={"temperature": 0}).build(ROWS[0], 0)
    cached = builder("Sold at {{ row.shop }}.", params={"temperature": 0}, cache_system="1h").build(ROWS[0], 0)
    assert plain.custom_id == f"{JOB}-50a0ac910ae9626cc15afb08a876d54f40b17813"
    assert cached.custom_id == f"{JOB}-c4c104871bddd8e9a723d0534c1772e36d5d607b"


def test_cache_system_marks_the_last_block_and_leaves_the_users_blocks_alone() -> None:
    """As it marks a text; the list that the task was given stays as it was."""
    system = [text(LONG), text("Last.")]
    sent = json.loads(builder(system, cache_system="1h").build(ROWS[0], 0).params)["system"]
    assert sent == [text(LONG), text("Last.", HOUR)]
    assert system == [text(LONG), text("Last.")]


@pytest.mark.parametrize(
    ("system", "problem"),
    [
        ({"type": "text", "text": "x"}, "system must be a text or a list of content blocks, not dict"),
        (5, "system must be a text or a list of content blocks, not int"),
        (b"x", "not bytes"),
        (["Be brief."], r"system\[0\] must be a content block, .* not str"),
        ([text("x"), {"type": "image", "source": {}}], r"system\[1\] has the type 'image'"),
        ([{"text": "x"}], r"system\[0\] has the type None"),
        ([text("")], r"system\[0\] has no text"),
        ([text("x"), text(" \n")], r"system\[1\] has no text"),
        ([{"type": "text"}], r"system\[0\] has no text"),
        ([{"type": "text", "text": ["x"]}], r"system\[0\] has no text"),
        ([text(str(i), HOUR) for i in range(5)], r"5 cache_control markers, and a request may have 4: system\[0\], "),
        ([text("x", "ephemeral")], r"the cache_control of system\[0\] must be .* not 'ephemeral'"),
        ([text("x", {"ttl": "1h"})], r"the cache_control of system\[0\] must be"),
        ([text("x", {"type": "ephemeral", "ttl": "24h"})], "a ttl of '5m' or '1h' if any"),
        ([text("x", {"type": "ephemeral", "ttl": ["1h"]})], "a ttl of '5m' or '1h' if any"),
        ([text("x", {})], r"the cache_control of system\[0\] must be"),
        ([text("x", MINUTES), text("y"), text("z", HOUR)], r"system\[2\] has the ttl '1h' and comes after that of system\[0\] with '5m'"),
        ([text("x", {"type": "ephemeral"}), text("z", HOUR)], "the longer one must come first"),
    ],
)
def test_what_the_api_would_refuse_of_a_system_prompt_is_refused(system: Any, problem: str) -> None:
    """By a task when it is parsed, by the kit before anything is sent, and in a native request's own params."""
    import re

    found = system_problem_of_task(system, prompt="x", params={})
    assert found is not None
    assert re.search(problem, found)
    found = system_problem_of_task(None, prompt="x", params={"system": system})
    assert found is not None
    assert re.search(problem.replace("system must", r"params\['system'\] must"), found.replace("params['system'][", "system["))
    with pytest.raises(RequestError, match=problem):
        BatchKit(api_key="k").submit(prompts=["x"], model="claude-haiku-5-5", max_tokens=5, system=system)
    with pytest.raises(RequestError, match=f"request 0: .*{problem}"):
        RequestBuilder(RequestDefaults()).build({"params": native(system=system)}, 0)


def native(**params: Any) -> dict[str, Any]:
    return {"model": "claude-haiku-5-5", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], **params}


def test_markers_are_counted_over_tools_system_and_messages() -> None:
    """Four in all pass, a fifth in a message does not; a marker at the top level takes a place unless the last block is marked itself."""
    tools = [{"name": "t", "input_schema": {"type": "object"}, "cache_control": HOUR}]
    system = [text("a", HOUR), text("b", MINUTES)]
    turn = {"role": "user", "content": [text("c", MINUTES)]}
    check_params(native(tools=tools, system=system, messages=[turn]))
    check_params(native(tools=tools, system=system, messages=[turn], cache_control=MINUTES))
    with pytest.raises(RequestError, match=r"5 cache_control markers, .*messages\[1\]\.content\[0\]"):
        check_params(native(tools=tools, system=system, messages=[turn, {**turn, "role": "assistant"}]))
    with pytest.raises(RequestError, match=r"the cache_control of params has the ttl '1h' and comes after that of system\[1\]"):
        check_params(native(system=system, cache_control=HOUR))
    with pytest.raises(RequestError, match=r"the cache_control of system\[0\] has the ttl '1h' and comes after that of tools\[0\]"):
        check_params(native(tools=[{**tools[0], "cache_control": MINUTES}], system=system))


def test_what_is_newer_than_this_package_passes_where_all_is_let_through() -> None:
    """Names one by one, forms with True."""
    newer = [text("a", {"type": "ephemeral", "ttl": "24h"}), {"type": "image", "source": {}}]
    check_params(native(system=newer), ParamNames(True))
    with pytest.raises(RequestError, match=r"system\[0\] has 'cache_controll'.*nearest is 'cache_control'"):
        check_params(native(system=[text("a", cache_controll=HOUR)]))
    check_params(native(system=[text("a", weight=2)]), ParamNames(["system.weight"]))
    sent = builder([text("{{ row.sku }}", weight=2)], names=ParamNames(["system.weight"])).build(ROWS[0], 0)
    assert json.loads(sent.params)["system"] == [text("A", weight=2)]


def test_a_row_without_a_text_for_a_block_is_named() -> None:
    """The API refuses an empty block, so the row is named before anything is sent."""
    built = builder([text("Same."), text("{{ row.shop }}")])
    with pytest.raises(RequestError, match=r"row 1 \(sku='B'\): system\[1\] has no text\. Nothing was sent"):
        built.build_all([ROWS[0], {"sku": "B", "name": "tea", "shop": None}], 0)
    with pytest.raises(RequestError, match=r"row 0 \(sku='A'\): the system\[1\] template uses something that is not there: .*shop"):
        built.build_all([{"sku": "A", "name": "tea"}], 0)


@pytest.mark.parametrize(
    ("system", "warning"),
    [
        ([text(LONG, HOUR), text("{{ row.shop }}")], ""),
        ([text(LONG), text("{{ row.shop }}", HOUR)], "differs between rows"),
        ([text("Short.", HOUR), text(LONG)], "too short to be cached"),
        ([text("{{ row.shop }}")], ""),
    ],
)
def test_only_what_is_before_the_last_marker_must_be_long_and_the_same(caplog: pytest.LogCaptureFixture, system: Any, warning: str) -> None:
    """Rows may differ behind it."""
    with caplog.at_level(logging.WARNING):
        builder(system).build_all(ROWS, 0)
    assert [warning in record.message for record in caplog.records] == [True] * bool(warning)


def test_a_system_template_without_a_prompt_over_rows_is_refused() -> None:
    """It would be left out of every request without a word."""
    found = system_problem_of_task("Be brief.", prompt=None, params={})
    assert found is not None
    assert "params['system']" in found


@pytest.mark.parametrize(
    ("given", "works"),
    [
        ({"system": [text("x", HOUR)]}, True),
        ({"system": [text("x")]}, False),
        ({"system": [text("x")], "cache_system": "5m"}, True),
        ({"system": None, "params": {"system": [text("x", MINUTES)]}}, True),
        ({"system": "x", "params": {"tools": [{"name": "t", "cache_control": HOUR}]}}, True),
        ({"system": "x", "params": {"cache_control": HOUR}}, False),
    ],
)
def test_priming_needs_a_marker_that_rows_share(given: dict[str, Any], works: bool) -> None:
    """A marker at the top level ends with the row's own message, so no other row reads it."""
    found = system_problem_of_task(**{"prompt": "x", "params": {}, "prime_cache": True, **given})
    assert (found is None) == works
    assert works or "prime_cache needs cache_system" in str(found)
