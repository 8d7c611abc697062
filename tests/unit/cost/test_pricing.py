from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Context, Decimal, localcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import genai_prices
import pytest
from genai_prices.data import providers
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.cost.prices import PriceBook, cost_of_pico, load_price_overrides
from airflow_provider_batchkit.cost.tally import TallyBuilder, format_tally
from airflow_provider_batchkit.exceptions import BatchInputError
from airflow_provider_batchkit.model import BatchItem, Cost, CostTally, ModelTally, RequestStatus, Usage

NOW = datetime(2026, 11, 23, tzinfo=UTC)
MODELS = {model.id: model for provider in providers if provider.id == "anthropic" for model in provider.models}
BOOK = PriceBook()
OPUS = {"input_usd_per_mtok": "4.5", "output_usd_per_mtok": "20"}
#: DOCS/about-claude/pricing, "Data residency pricing", checked 2026-11-23: Opus 4.6 and later models
US_ONLY_MODELS = {
    *("claude-opus-4-6", "claude-opus-4-7", "claude-opus-4-8", "claude-opus-5", "claude-opus-5-5", "claude-sonnet-4-6", "claude-sonnet-5"),
    *("claude-sonnet-5-5", "claude-haiku-5-5", "claude-fable-5", "claude-fable-5-1", "claude-fable-5-2", "claude-mythos-5-2"),
}

# small numbers, tier edges, and a million-token prompt; sums of four land on both sides of every tier
TOKENS = st.one_of(st.integers(0, 300), st.sampled_from([99_999, 100_000, 100_001, 200_000, 200_001]), st.integers(0, 1_000_000))
USAGES = st.builds(
    Usage,
    input_tokens=TOKENS,
    output_tokens=TOKENS,
    cache_write_5m_tokens=TOKENS,
    cache_write_1h_tokens=TOKENS,
    cache_read_tokens=TOKENS,
    web_searches=st.integers(0, 20),
    inference_geo=st.sampled_from([None, "global", "us", "not_available"]),
    speed=st.sampled_from([None, "standard", "fast"]),
)
TIMES = st.datetimes(datetime(2025, 1, 1), datetime(2027, 6, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the strategy adds the zone


def add(builder: TallyBuilder, model: str, usage: Usage) -> Cost | None:
    """Count one request."""
    (batch,), (standard,) = builder.add_all(ResultBlock.of([BatchItem("c", RequestStatus.SUCCEEDED, model=model, usage=usage)]))
    return None if batch is None or standard is None else cost_of_pico(batch, standard)


def by_genai_prices(model: str, usage: Usage, at: datetime, context: dict[str, str]) -> Decimal:
    """The total of ``calc_price``, whose input counts the cached tokens too."""
    total = usage.prompt_tokens
    counted = genai_prices.Usage(
        input_tokens=total,
        output_tokens=usage.output_tokens,
        cache_write_tokens=usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
        cache_write_5m_tokens=usage.cache_write_5m_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        web_searches=usage.web_searches,
    )
    return genai_prices.calc_price(
        counted, model_ref=model, provider_id="anthropic", genai_request_timestamp=at, price_context=context
    ).total_price


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), usage=USAGES, at=TIMES)
def test_costs_equal_those_of_genai_prices(name: str, usage: Usage, at: datetime) -> None:
    """For every bundled Claude model, date and usage, our integers give what calc_price gives, exactly."""
    usage = Usage(**{f: getattr(usage, f) for f in usage.__struct_fields__ if f != "inference_geo"})
    cost = BOOK.cost(name, usage, at)
    assert cost is not None
    known = BOOK.rates(name, at)
    assert known is not None
    # models too old for web search have no price for it in the data, and $0.01 here
    has_search = MODELS[name].get_prices(at).web_searches_kcount is not None
    search = 0 if has_search else usage.web_searches * Decimal("0.01")
    context = {"speed": "fast"} if usage.speed == "fast" else {}
    assert cost.standard_usd == by_genai_prices(name, usage, at, context) + search
    listed = any(
        variant.when == {"processing": "batch"} and (variant.constraint is None or variant.constraint.active(at))
        for variant in MODELS[name].price_variants or []
    )
    if listed:
        assert cost.batch_usd == by_genai_prices(name, usage, at, {"processing": "batch"}) + search
    else:
        searches = usage.web_searches * Decimal("0.01")
        assert cost.batch_usd == (by_genai_prices(name, usage, at, {}) + search - searches) / 2 + searches


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["claude-haiku-5-5", "claude-opus-4-8", "nobody-knows-this"]), st.none() | USAGES), max_size=30))
def test_results_that_are_counted_together_cost_what_they_cost_alone(rows: list[tuple[str, Usage | None]]) -> None:
    """Of any models, tiers, regions and speeds, in any order, with some that the API counts nothing for."""
    items = [
        BatchItem("c", RequestStatus.EXPIRED) if usage is None else BatchItem("c", RequestStatus.SUCCEEDED, model=model, usage=usage)
        for model, usage in rows
    ]
    together, alone = TallyBuilder(BOOK, NOW), TallyBuilder(BOOK, NOW)
    costs = list(zip(*together.add_all(ResultBlock.of(items)), strict=True))
    assert costs == [cost for item in items for cost in zip(*alone.add_all(ResultBlock.of([item])), strict=True)]
    for (_, usage), item, (batch, standard) in zip(rows, items, costs, strict=True):
        expected = Cost(Decimal(0), Decimal(0)) if usage is None else BOOK.cost(item.model or "", usage, NOW)
        assert (None if batch is None or standard is None else cost_of_pico(batch, standard)) == expected
    assert together.tally() == alone.tally()


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from([*sorted(MODELS), "negotiated"]), USAGES), max_size=30), at=TIMES)
def test_row_costs_add_up_to_the_tally(rows: list[tuple[str, Usage]], at: datetime) -> None:
    """The tally is the exact sum of the rows: in money, per model, in tokens, and however the rows are split over tallies."""
    book = PriceBook({"negotiated": {"input_usd_per_mtok": "0.333333", "output_usd_per_mtok": "0.000001", "batch_discount": "0.123457"}})
    whole, halves = TallyBuilder(book, at), (TallyBuilder(book, at), TallyBuilder(book, at))
    costs = []
    for index, (model, usage) in enumerate(rows):
        cost = add(whole, model, usage)
        assert cost is not None
        assert cost == add(halves[index % 2], model, usage) == book.cost(model, usage, at)
        costs.append((model, cost))
    tally = whole.tally()
    assert tally.batch_cost_usd == sum((cost.batch_usd for _, cost in costs), Decimal(0))
    assert tally.standard_cost_usd == sum((cost.standard_usd for _, cost in costs), Decimal(0))
    for name, line in tally.models.items():
        assert line.batch_cost_usd == sum(cost.batch_usd for model, cost in costs if model == name)
    for field in ("input_tokens", "output_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "cache_read_tokens", "web_searches"):
        assert getattr(tally, field) == sum(getattr(usage, field) for _, usage in rows), field
    assert tally.requests == len(rows)
    uncached = TallyBuilder(book, at)
    for model, usage in rows:
        add(uncached, model, usage.uncached())
    plain = uncached.tally()
    assert plain.batch_cost_usd is not None and tally.batch_cost_usd is not None
    assert tally.cache_savings_usd == plain.batch_cost_usd - tally.batch_cost_usd
    assert plain.cache_savings_usd == 0
    assert halves[0].tally() + halves[1].tally() == tally


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_bundled_batch_prices_are_half_of_the_standard_ones(name: str) -> None:
    """Where the data has a batch price it equals the documented half, so the half is right where the data has none."""
    rates = BOOK.rates(name, NOW)
    assert rates is not None
    for tier in rates.tiers:
        assert tier.batch == tier.standard.times(Decimal("0.5"))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_us_only_inference_costs_more_on_opus_4_6_and_later(name: str) -> None:
    """The documented list of models, and no other, has the multiplier; a new bundled model must be put on one side here."""
    rates = BOOK.rates(name, NOW)
    assert rates is not None
    assert rates.us_multiplier == (Decimal("1.1") if name in US_ONLY_MODELS else 1)


def test_fifty_thousand_rows_of_opus_cost_four_hundred_dollars() -> None:
    """50,000 * (2,700 in, 100 out): 50,000 * $0.008 in a batch, 50,000 * $0.016 without."""
    builder = TallyBuilder(PriceBook(), NOW)
    for _ in range(50_000):
        add(builder, "claude-opus-4-8", Usage(input_tokens=2700, output_tokens=100))
    tally = builder.tally()
    assert (tally.batch_cost_usd, tally.standard_cost_usd, tally.savings_usd) == (Decimal(400), Decimal(800), Decimal(400))
    assert tally.input_tokens == 135_000_000
    assert format_tally(tally).splitlines()[-1] == "batch $400.00  standard $800.00  savings $400.00"


@pytest.mark.parametrize(
    "name", ["claude-opus-4-10", "claude-opus-4-80", "claude-sonnet-4-50", "claude-opus-4-8-mini", "claude-haiku-4-5-thinking"]
)
def test_a_new_model_does_not_get_the_price_of_one_whose_name_begins_alike(name: str) -> None:
    """The data matches by beginnings: a bill at another model's price looks like any other bill."""
    assert PriceBook().rates(name, NOW) is None


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("claude-opus-4-8-20260501", "claude-opus-4-8"),
        ("claude-sonnet-5@20260101", "claude-sonnet-5"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4-0"),
        ("claude-3-5-sonnet-20241022-v2:0", "claude-3-5-sonnet"),
        ("claude-3-7-sonnet-latest", "claude-3-7-sonnet-20250219"),
        ("claude-opus-5-2026-08-01", "claude-opus-5"),
        ("claude-haiku-5.5", "claude-haiku-5-5"),
    ],
)
def test_a_date_and_a_version_behind_a_name_change_no_price(name: str, same_as: str) -> None:
    """Answers name the dated model."""
    rates = PriceBook().rates(same_as, NOW)
    assert rates is not None
    assert PriceBook().rates(name, NOW) == rates


def test_an_unknown_model_is_none_counted_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its cost is never zero, its tokens count, and a million rows do not make a million log lines."""
    book = PriceBook()
    with caplog.at_level(logging.WARNING):
        builder = TallyBuilder(book, NOW)
        assert add(builder, "claude-imaginary-9", Usage(input_tokens=7, output_tokens=5)) is None
        assert add(builder, "claude-imaginary-9", Usage(input_tokens=1)) is None
        assert book.cost("claude-imaginary-9", Usage(), NOW + timedelta(days=1)) is None
        add(builder, "claude-opus-4-8", Usage(input_tokens=1))
    tally = builder.tally()
    assert len(caplog.records) == 1
    expected = f"No price is known for model 'claude-imaginary-9' in {book.version}: its tokens are counted, its cost is unknown."
    assert caplog.records[0].getMessage().startswith(expected)
    assert tally.models["claude-imaginary-9"] == ModelTally(2, 8, 5, batch_cost_usd=None, standard_cost_usd=None)
    assert tally.models["claude-opus-4-8"].batch_cost_usd == Decimal("0.0000025")
    assert tally.batch_cost_usd is None


def test_what_caching_saved_is_priced_by_the_tier_of_the_whole_prompt() -> None:
    """By hand, haiku-5-5 in a batch: $0.05 per MTok of input, twice that to write for an hour, a tenth to read; 5 times above 100,000."""
    builder = TallyBuilder(PriceBook(), NOW)
    add(builder, "claude-haiku-5-5", Usage(input_tokens=1_000, output_tokens=50, cache_write_1h_tokens=60_000))
    assert builder.tally().cache_savings_usd == 60_000 * Decimal("-0.05e-6")
    add(builder, "claude-haiku-5-5", Usage(input_tokens=1_000, output_tokens=50, cache_read_tokens=60_000))
    assert builder.tally().cache_savings_usd == 60_000 * Decimal("-0.005e-6")
    add(builder, "claude-haiku-5-5", Usage(input_tokens=50_000, output_tokens=50, cache_read_tokens=60_000))
    tally = builder.tally()
    assert tally.cache_savings_usd == 60_000 * (Decimal("-0.005e-6") + 5 * Decimal("0.045e-6"))
    assert format_tally(tally).splitlines()[-1].endswith("  cache savings $0.0132")


def test_what_caching_saved_is_unknown_where_a_price_or_an_old_tally_does_not_say() -> None:
    """A tally that was written before it was counted; and a model without a price, if it cached anything."""
    builder = TallyBuilder(PriceBook(), NOW)
    add(builder, "claude-imaginary-9", Usage(input_tokens=1))
    assert builder.tally().cache_savings_usd == 0
    add(builder, "claude-imaginary-9", Usage(input_tokens=1, cache_read_tokens=1))
    assert builder.tally().cache_savings_usd is None
    for usage, savings in ((Usage(input_tokens=1), Decimal(0)), (Usage(input_tokens=1, cache_read_tokens=9), None)):
        builder = TallyBuilder(PriceBook(), NOW)
        add(builder, "claude-opus-4-8", usage)
        written = builder.tally().to_json()
        assert CostTally.from_json(written) == builder.tally()
        for line in (written, *written["models"].values()):
            del line["cache_savings_usd"]
        assert CostTally.from_json(written).cache_savings_usd == savings


def test_prices_are_resolved_once_per_model_and_utc_date() -> None:
    """One object serves all rows of a day, whichever zone the time is written in; the next day has its own."""
    book = PriceBook()
    rates = book.rates("claude-opus-4-8", datetime(2026, 10, 13, 23, 30, tzinfo=UTC))
    assert rates is book.rates("claude-opus-4-8", datetime(2026, 10, 14, 1, 0, tzinfo=timezone(timedelta(hours=2))))
    assert rates is not book.rates("claude-opus-4-8", datetime(2026, 10, 14, tzinfo=UTC))


def test_a_time_without_a_zone_is_refused() -> None:
    """A date that depends on the machine's zone is no date to price by."""
    with pytest.raises(BatchInputError, match="2026-11-23T00:00:00 has no time zone"):
        PriceBook().rates("claude-opus-4-8", NOW.replace(tzinfo=None))


def test_costs_do_not_depend_on_the_callers_decimal_context() -> None:
    """Somebody else's three-digit context rounds neither a price nor a cost."""
    overrides = {"m": {"input_usd_per_mtok": "0.333333", "output_usd_per_mtok": "12.345678", "batch_discount": "0.123457"}}
    usage = Usage(input_tokens=123_457, output_tokens=100_003, inference_geo="us")
    expected = PriceBook(overrides).cost("m", usage, NOW)
    with localcontext(Context(prec=3)):
        rates = PriceBook(overrides).rates("m", NOW)
        assert PriceBook(overrides).cost("m", usage, NOW) == expected
    assert rates == PriceBook(overrides).rates("m", NOW)


def test_importing_pricing_loads_no_price_data() -> None:
    """A DAG file is parsed every minute; 1.6 MB of prices wait for the first look-up, also when a book is made."""
    code = (
        "import sys; from airflow_provider_batchkit.cost.prices import PriceBook; PriceBook({}, live=True);"
        "sys.exit('genai_prices' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[3]).returncode == 0


def test_an_override_covers_dated_names_and_a_dated_one_wins() -> None:
    """The API reports ``claude-opus-4-8-20260601`` for ``claude-opus-4-8``; a neighbour's price stays its own."""
    book = PriceBook({"claude-opus-4-8": OPUS, "claude-opus-4-8-20260701": {**OPUS, "input_usd_per_mtok": 1}})
    usage = Usage(input_tokens=1_000_000)

    def standard(model: str) -> Decimal:
        cost = book.cost(model, usage, NOW)
        assert cost is not None
        return cost.standard_usd

    assert standard("claude-opus-4-8") == standard("claude-opus-4-8-20260601") == Decimal("4.5")
    assert standard("claude-opus-4-8-20260701") == 1
    assert standard("claude-opus-4-7") == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], None),
        (["x"], r"price override must be a table from model names to prices, not \['x'\]"),
        ({"": OPUS}, "for model '': the model's name must be a non-empty string"),
        ({"m": 5}, "for model 'm' is 5: must be a table of input_usd_per_mtok, output_usd_per_mtok, "),
        ({"m": {"input_usd_per_mtok": 1}}, "for model 'm': field 'output_usd_per_mtok' is missing"),
        ({"m": {**OPUS, "input": 1}}, "for model 'm': unknown field 'input'; use input_usd_per_mtok, "),
        ({"m": {**OPUS, "input_usd_per_mtok": "-1"}}, "'m': field 'input_usd_per_mtok' is '-1': must be finite and not negative"),
        ({"m": {**OPUS, "cache_read_usd_per_mtok": "cheap"}}, "'m': field 'cache_read_usd_per_mtok' is 'cheap': is not a decimal number"),
        ({"m": {**OPUS, "input_usd_per_mtok": 4.5}}, "field 'input_usd_per_mtok' is 4.5: must be a string, an int or a Decimal; a float"),
        ({"m": {**OPUS, "input_usd_per_mtok": True}}, "field 'input_usd_per_mtok' is True: must be a string, an int or a Decimal"),
        ({"m": {**OPUS, "input_usd_per_mtok": None}}, "field 'input_usd_per_mtok' is None: must be a string, an int or a Decimal"),
        ({"m": {**OPUS, "input_usd_per_mtok": "NaN"}}, "field 'input_usd_per_mtok' is 'NaN': must be finite"),
        ({"m": {**OPUS, "output_usd_per_mtok": "0.1234567"}}, "is '0.1234567': must not have more than 6 decimals"),
        ({"m": {**OPUS, "output_usd_per_mtok": "1E+9"}}, "is '1E\\+9': must not be above 1,000,000; it is in USD"),
        ({"m": {**OPUS, "batch_discount": 50}}, "field 'batch_discount' is 50: must not be above 1; it is a share of the price"),
        ({"m": {**OPUS, "output_usd_per_mtok": "0.1000000"}}, None),
    ],
)
def test_a_bad_override_is_refused_by_name(overrides: Any, message: str | None) -> None:
    """The error names the model, the field and the value, and says what is allowed; a good one passes."""
    if message is None:
        PriceBook(overrides)
        return
    with pytest.raises(BatchInputError, match=message):
        PriceBook(overrides)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prices.json", '{"claude-opus-4-8": {"input_usd_per_mtok": 4.1, "output_usd_per_mtok": "20.5"}}'),
        ("prices.toml", '[claude-opus-4-8]\ninput_usd_per_mtok = 4.1\noutput_usd_per_mtok = "20.5"\n'),
    ],
)
def test_overrides_are_read_exactly_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    """A bare 4.1 in a file is 4.1, not the float nearest to it."""
    (tmp_path / name).write_text(text)
    overrides = load_price_overrides(tmp_path / name)
    assert overrides == {"claude-opus-4-8": {"input_usd_per_mtok": Decimal("4.1"), "output_usd_per_mtok": Decimal("20.5")}}
    cost = PriceBook(overrides).cost("claude-opus-4-8", Usage(input_tokens=10), NOW)
    assert cost is not None
    assert cost.standard_usd == Decimal("0.000041")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prices.json", b"{", r"prices\.json cannot be read: .*line 1"),
        ("prices.toml", b"a = \nb = 1", r"prices\.toml cannot be read: .*line 1"),
        ("prices.json", b"\xff", r"prices\.json cannot be read"),
        ("prices.yaml", b"", r"prices\.yaml: its name must end in \.json or \.toml"),
        ("prices.json", None, r"prices\.json cannot be read: .*No such file"),
        ("prices.json", b"[1]", r"must be a table from model names to prices, not \[1\]"),
        ("prices.json", b'{"m": {"input_usd_per_mtok": NaN, "output_usd_per_mtok": 1}}', "is nan: must be a string"),
    ],
)
def test_an_unusable_override_file_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    """The error names the file and where it breaks."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BatchInputError, match=message):
        load_price_overrides(str(tmp_path / name))


def test_the_version_names_the_prices() -> None:
    """Equal overrides have one name however they are written, other ones another, and none has none."""
    installed = f"genai-prices {genai_prices.__version__}"
    assert PriceBook().version == installed
    overridden = PriceBook({"a": OPUS, "b": OPUS}).version
    assert overridden.startswith(f"{installed}+overrides:")
    assert len(overridden) == len(f"{installed}+overrides:") + 8
    respelt = {"output_usd_per_mtok": 20, "input_usd_per_mtok": Decimal("4.500")}
    assert PriceBook({"b": respelt, "a": respelt}).version == overridden
    assert PriceBook({"a": OPUS}).version != overridden


def test_the_tally_names_its_prices_and_an_empty_one_names_none() -> None:
    """So that a sum over months lists the price versions that it rests on."""
    builder = TallyBuilder(BOOK, NOW)
    assert builder.tally() == CostTally()
    add(builder, "claude-opus-4-8", Usage())
    assert builder.tally().price_version == BOOK.version


class PriceServer(BaseHTTPRequestHandler):
    """Serves what the test put into ``answer``: status and body."""

    answer: tuple[int, bytes] = (500, b"")
    requests = 0

    def do_GET(self) -> None:
        """Answer, and count."""
        type(self).requests += 1
        status, body = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def price_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a price file on loopback, reached without any proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    PriceServer.requests = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), PriceServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/data.json"
    server.shutdown()
    server.server_close()
    thread.join()


def live_file(**prices: float | list[dict[str, Any]]) -> bytes:
    """A price file in the form that genai-prices publishes, with one Claude model."""
    variants = prices.pop("price_variants", [])
    model = {"id": "claude-opus-4-8", "match": {"starts_with": "claude-opus-4-8"}, "prices": prices, "price_variants": variants}
    return json.dumps([{"id": "anthropic", "name": "Anthropic", "api_pattern": "x", "models": [model]}]).encode()


def test_live_prices_are_fetched_once_and_named(price_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """The new price holds for this book only, the version says when it was fetched, and rows cost no further requests."""
    PriceServer.answer = (200, live_file(input_mtok=6.5, output_mtok=30))
    book = PriceBook(live=True, live_url=price_url)
    assert PriceServer.requests == 0
    costs = {book.cost("claude-opus-4-8", Usage(input_tokens=1_000_000), NOW + timedelta(days=day)) for day in range(3)}
    assert [(cost.batch_usd, cost.standard_usd) for cost in costs if cost] == [(Decimal("3.25"), Decimal("6.5"))]
    name, _, fetched = book.version.partition("+live ")
    assert name == f"genai-prices {genai_prices.__version__}"
    assert abs(datetime.fromisoformat(fetched) - datetime.now(UTC)) < timedelta(minutes=5)
    assert PriceServer.requests == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    bundled = PriceBook().cost("claude-opus-4-8", Usage(input_tokens=1_000_000), NOW)
    assert bundled is not None
    assert bundled.standard_usd == 5


def test_a_batch_price_in_the_data_wins_over_the_half(price_url: str) -> None:
    """From its first day on the listed batch price holds, half or not; cache writes take the general write price where it is alone."""
    batch = {"when": {"processing": "batch"}, "constraint": {"start_date": "2026-11-01"}, "prices": {"input_mtok": 6}}
    PriceServer.answer = (200, live_file(input_mtok=8, output_mtok=30, cache_write_mtok=10, price_variants=[batch]))
    book = PriceBook(live=True, live_url=price_url)
    fresh, written = Usage(input_tokens=1_000_000), Usage(cache_write_1h_tokens=1_000_000)
    costs = [book.cost("claude-opus-4-8", usage, at) for at in (NOW, datetime(2026, 10, 31, tzinfo=UTC)) for usage in (fresh, written)]
    expected = [(6, 8), (10, 10), (4, 8), (5, 10)]
    assert [(cost.batch_usd, cost.standard_usd) for cost in costs if cost] == [(Decimal(b), Decimal(s)) for b, s in expected]


@pytest.mark.parametrize("answer", [(500, b""), (200, b"<html>"), (200, b"{}"), (200, b"[]"), (200, b'[{"id": 1}]'), None])
def test_a_failed_live_update_leaves_the_bundled_prices(
    price_url: str, caplog: pytest.LogCaptureFixture, answer: tuple[int, bytes] | None
) -> None:
    """A server error, a file that is none, one without Claude, and no server at all: one warning, the bundled price, an honest version."""
    if answer is None:
        price_url = "http://127.0.0.1:1/data.json"
    else:
        PriceServer.answer = answer
    book = PriceBook(live=True, live_url=price_url)
    with caplog.at_level(logging.WARNING):
        cost = book.cost("claude-opus-4-8", Usage(input_tokens=1_000_000), NOW)
        assert book.version == f"genai-prices {genai_prices.__version__}"
    assert cost is not None
    assert cost.standard_usd == 5
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(f"Prices could not be updated from {price_url} (")


def test_the_table_shows_every_model_and_the_total() -> None:
    """Columns line up, cache writes of both lengths are one column, and one unknown price makes the total unknown."""
    known = ModelTally(50_000, 135_000_000, 5_000_000, 1_000, 200, 30, 0, Decimal("1234.5678"), Decimal("2469.1356"), Decimal("-0.004"))
    unknown = ModelTally(1, 2, 3, batch_cost_usd=None, standard_cost_usd=None)
    assert format_tally(CostTally({"b": known, "a-longer-name": unknown})).splitlines() == [
        "model          requests        input     output  cache write  cache read  batch cost  standard cost    savings",
        "a-longer-name         1            2          3            0           0     unknown        unknown    unknown",
        "b                50,000  135,000,000  5,000,000        1,200          30   $1,234.57      $2,469.14  $1,234.57",
        "total            50,001  135,000,002  5,000,003        1,200          30     unknown        unknown    unknown",
        "batch unknown  standard unknown  savings unknown  cache savings -$0.004",
    ]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "$0.00"),
        ("400", "$400.00"),
        ("1234567.895", "$1,234,567.90"),
        ("1", "$1.00"),
        ("1.234567", "$1.23"),
        ("0.9999999", "$1.00"),
        ("0.5", "$0.50"),
        ("0.123456789", "$0.123457"),
        ("0.008", "$0.008"),
        ("0.000000005", "$0.000000005"),
        ("-2.5", "-$2.50"),
    ],
)
def test_money_reads_well_at_every_size(amount: str, text: str) -> None:
    """Cents from a dollar on, six significant digits below, and a tiny cost never reads as nothing."""
    tally = CostTally({"m": ModelTally(1, batch_cost_usd=Decimal(amount), standard_cost_usd=Decimal(amount))})
    assert format_tally(tally).splitlines()[-1] == f"batch {text}  standard {text}  savings $0.00"
