"""BatchKit: submit, wait, retrieve and run over an ``anthropic`` client. No Airflow, no database."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_batchkit.api.blocks import ResultBlock
from airflow_provider_batchkit.api.calls import BatchApi
from airflow_provider_batchkit.api.looking import look, pause_after
from airflow_provider_batchkit.api.polling import Ended, GaveUp, Late, PollState, TimedOut, Unseen, Wait
from airflow_provider_batchkit.api.results import Reconciler, StreamFaults, parse_blocks
from airflow_provider_batchkit.cost.checks import check_shards
from airflow_provider_batchkit.cost.estimate import Estimate, estimate_shards
from airflow_provider_batchkit.cost.prices import PriceBook
from airflow_provider_batchkit.cost.tally import TallyBuilder
from airflow_provider_batchkit.exceptions import (
    BatchInputError,
    BatchNotVisibleError,
    BatchWaitTimeout,
    PollError,
    ResultStreamError,
    SubmitRefusedError,
    SubmitThrottledError,
    SubmitUncertainError,
)
from airflow_provider_batchkit.model import (
    MAX_BYTES_PER_BATCH,
    MAX_REQUESTS_PER_BATCH,
    BatchCounts,
    BatchItem,
    BatchSnapshot,
    CostTally,
    RequestStatus,
)
from airflow_provider_batchkit.request.build import (
    RequestBuilder,
    RequestDefaults,
    items_of,
    position_of,
    prompts_of,
    refuse_repeated_ids,
)
from airflow_provider_batchkit.request.params import ParamNames
from airflow_provider_batchkit.request.scratch import scratch_folder
from airflow_provider_batchkit.request.shards import Shard, ShardWriter, read_index, remove_shard_files

if TYPE_CHECKING:
    import anthropic

    from airflow_provider_batchkit.api.cancel import Cancellation

log = logging.getLogger(__name__)

#: The API processes a batch within 24 hours or expires the rest (its documentation). The hour more is for clocks and queues.
DEFAULT_TIMEOUT_S = 25 * 3600.0
_STREAM_ATTEMPTS = 5

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Results of one or more batches, what they cost, and what was wrong with the streams."""

    #: items in the order of the requests: always after :meth:`BatchKit.run`, and after :meth:`BatchKit.retrieve` as far as the ids give it
    items: list[BatchItem]
    tally: CostTally
    counts: BatchCounts
    faults: StreamFaults


class BatchKit(BatchApi):
    """Message batches over a synchronous ``anthropic.Anthropic`` client.

    ::

        kit = BatchKit(api_key="…")
        batch_id = kit.submit(prompts=["Name a river.", "Name a lake."], model="claude-haiku-5-5", max_tokens=50)
        kit.wait(batch_id)
        result = kit.retrieve(batch_id)
        for item in result.items:
            print(item.custom_id, item.content)
        print(result.tally.batch_cost_usd)

    :meth:`run` does all three. :meth:`submit` returns a list, because many requests become several batches. Every method that takes batch
    ids takes this list.
    """

    def __init__(
        self,
        client: anthropic.Anthropic | None = None,
        *,
        api_key: str | None = None,
        price_book: PriceBook | None = None,
        allow_unknown_params: bool | Collection[str] = False,
    ) -> None:
        """
        :param client: any first-party client; by default, one is made from ``api_key`` or the environment
        :param price_book: the prices; the bundled ones by default
        :param allow_unknown_params: names of parameters that are newer than the installed SDK, which are otherwise refused as misspelt; a
            nested one with its path (``output_config.verbosity``). True allows every name, and models of any name
        """
        if client is None:
            import anthropic

            client = anthropic.Anthropic(api_key=api_key)
        super().__init__(client)
        self.price_book = price_book or PriceBook()
        #: the names that the params of requests may have
        self.param_names = ParamNames(allow_unknown_params, beta=self.sends_betas)

    def submit(
        self,
        requests: Iterable[Any] | None = None,
        *,
        prompts: Iterable[str] | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        system: Any = None,
        params: Mapping[str, Any] | None = None,
        max_requests_per_batch: int = MAX_REQUESTS_PER_BATCH,
        max_bytes_per_batch: int = MAX_BYTES_PER_BATCH,
    ) -> list[str]:
        """Submit any number of requests as one or more batches; returns the list of their ids. Takes either ``requests`` or ``prompts``.

        Everything is first checked and written to a temporary folder. The API is asked for its limits and for the tokens of a sample. So
        bad input costs nothing.

        :param requests: native ``{"custom_id", "params"}`` mappings or prompt strings; a string's ``custom_id`` is ``item-<position>``
        :param prompts: prompt strings only
        :param model: for requests that name none; the same holds for ``max_tokens``, ``system`` and ``params``
        :param max_bytes_per_batch: the most bytes of a batch's body
        :raises BatchInputError: for both or neither of ``requests`` and ``prompts``, and for a bare string; nothing was sent
        :raises RequestError: for input that the API would refuse, naming the item; nothing was sent
        :raises SubmitRefusedError: the API refused a batch; ``submitted`` on the error lists the batches that were accepted before
        :raises SubmitUncertainError: the connection broke at a moment that leaves open whether the batch was accepted
        """
        defaults = RequestDefaults(model, max_tokens, system, dict(params or {}), names=self.param_names)
        with scratch_folder() as folder:
            writer = ShardWriter(folder, max_requests=max_requests_per_batch, max_bytes=max_bytes_per_batch)
            return [batch_id for batch_id, _ in self._send_all(writer, _write(writer, _asked(requests, prompts), defaults))]

    def _send_all(self, writer: ShardWriter, shards: Sequence[Shard]) -> Iterator[tuple[str, Shard]]:
        """Each shard with its batch's id. A pair is given after the batch was accepted and before the shard's files are removed."""
        check_shards(self, shards, writer.samples)
        ids: list[str] = []
        for shard in shards:
            try:
                ids.append(self.send(shard).batch_id)
            except (SubmitRefusedError, SubmitThrottledError, SubmitUncertainError) as e:
                if ids:
                    e.add_note(f"Submitted before this: {', '.join(ids)}. They run and are billed; wait for them as usual.")
                e.submitted = list(ids)
                raise
            yield ids[-1], shard
            remove_shard_files(shard)

    def estimate(
        self,
        requests: Iterable[Any] | None = None,
        *,
        prompts: Iterable[str] | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        system: Any = None,
        params: Mapping[str, Any] | None = None,
    ) -> Estimate:
        """What :meth:`submit` would cost for the same requests today, expected and at most. Sends only token counts, which are free.

        :raises BatchInputError: for both or neither of ``requests`` and ``prompts``, and for a bare string
        :raises RequestError: for input that the API would refuse, naming the item
        """
        defaults = RequestDefaults(model, max_tokens, system, dict(params or {}), names=self.param_names)
        with scratch_folder() as folder:
            writer = ShardWriter(folder)
            shards = _write(writer, _asked(requests, prompts), defaults)
            return estimate_shards(shards, check_shards(self, shards, writer.samples), self.price_book, datetime.now(UTC))

    def wait(
        self,
        batch_ids: str | Sequence[str],
        *,
        interval_s: float = 5.0,
        max_interval_s: float = 120.0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_progress: Callable[[Mapping[str, BatchSnapshot]], None] | None = None,
    ) -> dict[str, BatchSnapshot]:
        """Wait until every batch has ended; blocks. The intervals between looks grow from ``interval_s`` to ``max_interval_s`` seconds.

        :param on_progress: called after each look with what is known of every batch
        :raises BatchWaitTimeout: not all had ended after ``timeout_s`` seconds; the batches keep running
        :raises PollError: looks kept failing, or a batch has answered 404 for ``absence_s`` seconds
        """
        ids, deadline = _as_ids(batch_ids), time.monotonic() + timeout_s
        state = PollState(ids, interval=interval_s, max_interval=max_interval_s, deadline=deadline, absence=self.absence_s)
        while True:
            self.look(state)
            if on_progress is not None:
                on_progress(state.seen)
            decision = state.decide(time.monotonic())
            if isinstance(decision, Ended):
                return {b: state.seen[b] for b in ids}
            if not isinstance(decision, Wait):
                assert not isinstance(decision, Late), "nobody is to hear of it here"
                raise _over(decision)
            time.sleep(decision.seconds)

    def look(self, state: PollState) -> None:
        """Look once at every open batch of ``state``, and note in it what was seen or why the look failed. Its news goes to the log."""
        look(self.get, state)

    def cancel_all(self, batch_ids: str | Iterable[str]) -> list[Cancellation]:
        """Cancel batches, several at a time, and say what became of each, in the order given. Takes 25 seconds at most.

        Each batch is canceled by itself, and a failure raises nothing. A batch that had already ended is a line in the log; any other
        failure is a warning with its reason. Answers that a batch has by then stay answered and billed.
        """
        from airflow_provider_batchkit.api.cancel import cancel_batches

        return cancel_batches(self.client, [batch_ids] if isinstance(batch_ids, str) else batch_ids)

    def read_items(
        self, batch_id: str, reconciler: Reconciler, expected: int, *, sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[BatchItem]:
        """The first answers of an ended batch as they come, each once, with their whole messages.

        A stream that is cut is read again, and results that were already seen are skipped. ``reconciler`` counts results that do not belong
        to the batch, and those missing of the ``expected`` results that the API counts. A stream that ends too early without an error is
        read once more. The broken end of a cut stream is not counted.

        Results that answer 404 are looked for again, for ``absence_s`` seconds at least.

        :raises ResultStreamError: the stream was cut five times in a row without progress
        :raises BatchNotVisibleError: the results stay invisible for that long
        """
        for block in self._read_whole(batch_id, reconciler, expected, sleep):
            yield from block.items()

    def _read_whole(
        self, batch_id: str, reconciler: Reconciler, expected: int, sleep: Callable[[float], None] = time.sleep
    ) -> Iterator[ResultBlock]:
        """The same as :meth:`read_blocks`, with messages."""

        def blocks(chunks: Iterator[bytes]) -> Iterator[ResultBlock]:
            return itertools.starmap(reconciler.accept_block, parse_blocks(chunks, block_bytes=1, keep_messages=True))

        return self._read(batch_id, reconciler, expected, blocks, sleep, patient=True)

    def read_blocks(
        self,
        batch_id: str,
        reconciler: Reconciler,
        expected: int,
        on_bytes: Callable[[int], None] = lambda _: None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Iterator[ResultBlock]:
        """The same as :meth:`read_items` in blocks and without messages, which is several times faster. A 404 is raised at once, because
        the caller has a better way to wait.

        :param on_bytes: called with the size of each chunk that has been downloaded
        """

        def blocks(chunks: Iterator[bytes]) -> Iterator[ResultBlock]:
            return itertools.starmap(reconciler.accept_block, parse_blocks(_counted(chunks, on_bytes)))

        return self._read(batch_id, reconciler, expected, blocks, sleep)

    def _get_patiently(self, batch_id: str) -> BatchSnapshot:
        unseen = Unseen(self.absence_s)
        while True:
            try:
                return self.get(batch_id)
            except BatchNotVisibleError as e:
                time.sleep(pause_after(e, unseen))

    def _read(
        self,
        batch_id: str,
        reconciler: Reconciler,
        expected: int,
        accepted: Callable[[Iterator[bytes]], Iterator[_T]],
        sleep: Callable[[float], None],
        *,
        patient: bool = False,
    ) -> Iterator[_T]:
        """The results, passed through ``accepted``; see :meth:`read_items`.

        :param patient: whether results that answer 404 are looked for here; otherwise the caller does it
        """
        failures, read_whole, unseen = 0, False, Unseen(self.absence_s)
        while True:
            done = reconciler.answered
            try:
                yield from accepted(self.stream_results(batch_id))
            except ResultStreamError as e:
                failures = 1 if reconciler.answered > done else failures + 1
                if failures >= _STREAM_ATTEMPTS:
                    raise
                log.warning("%s Reading again (%d of %d).", e, failures, _STREAM_ATTEMPTS)
                sleep(min(2.0**failures, 30.0))
            except BatchNotVisibleError as e:
                if not patient:
                    raise
                sleep(pause_after(e, unseen))
            else:
                short = reconciler.short_of(expected)
                if not short or read_whole:
                    reconciler.faults.short = short
                    return
                log.warning("The results of batch %s ended %d lines too early, without an error. Reading again.", batch_id, short)
                read_whole = True
            reconciler.read_again()

    def retrieve(self, batch_ids: str | Sequence[str]) -> Retrieval:
        """Read the results of one or more ended batches into memory.

        The API answers in any order. Items with ids ``item-<position>``, which prompts get, are returned in the order of their positions,
        over all batches of one submit. Other items stay where the API put them. For results larger than memory, iterate :meth:`read_items`.

        A batch that answers 404, or whose results do, is looked for again, for ``absence_s`` seconds at least: live batches answer 404 now
        and then.

        :raises BatchNotEndedError: a batch is still running
        :raises BatchNotVisibleError: a batch stays invisible for that long
        """
        found = [self._retrieve(batch_id, None) for batch_id in _as_ids(batch_ids)]
        return _together(found, _by_position([result.items for result in found]))

    def _retrieve(self, batch_id: str, asked: Mapping[str, str] | None) -> Retrieval:
        """The results of one batch, in the order in which they come.

        :param asked: every ``custom_id`` of the batch, with its key; None when they are not known
        """
        found = self._get_patiently(batch_id)
        builder = TallyBuilder(self.price_book, found.created_at)
        reconciler = Reconciler(asked)
        items: list[BatchItem] = []
        for block in self._read_whole(batch_id, reconciler, found.counts.total):
            builder.add_all(block)
            items += block.items()
        for odd in reconciler.faults.odd_members():
            log.warning("Batch %s: %s", batch_id, odd)
        return Retrieval(items, builder.tally(), found.counts, reconciler.faults)

    def run(
        self,
        requests: Iterable[Any] | None = None,
        *,
        prompts: Iterable[str] | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        system: Any = None,
        params: Mapping[str, Any] | None = None,
        interval_s: float = 5.0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_progress: Callable[[Mapping[str, BatchSnapshot]], None] | None = None,
    ) -> Retrieval:
        """Submit, wait and retrieve. Blocks until the last batch has ended; see :meth:`submit` and :meth:`wait`.

        ``items`` has one item for each request, in the order of the requests, so it can be zipped with them. A request without a result has
        the status ``missing`` and no content.
        """
        defaults = RequestDefaults(model, max_tokens, system, dict(params or {}), names=self.param_names)
        asked: dict[str, dict[str, str]] = {}
        with scratch_folder() as folder:
            writer = ShardWriter(folder)
            for batch_id, shard in self._send_all(writer, _write(writer, _asked(requests, prompts), defaults)):
                asked[batch_id] = {entry.custom_id: entry.key for entry in read_index(shard)}
        self.wait(list(asked), interval_s=interval_s, timeout_s=timeout_s, on_progress=on_progress)
        found = [self._retrieve(batch_id, ids) for batch_id, ids in asked.items()]
        items = [item for ids, result in zip(asked.values(), found, strict=True) for item in _of_each(ids, result.items)]
        return _together(found, items)


def _asked(requests: Iterable[Any] | None, prompts: Iterable[str] | None) -> Iterable[Any]:
    """The argument that is given of the two."""
    if (requests is None) == (prompts is None):
        raise BatchInputError(f"Give requests or prompts, not {'neither' if requests is None else 'both'}. Nothing was sent.")
    return items_of(requests) if prompts is None else prompts_of(prompts)


def _write(writer: ShardWriter, requests: Iterable[Any], defaults: RequestDefaults) -> list[Shard]:
    for piece in refuse_repeated_ids(RequestBuilder(defaults).pieces(requests)):
        writer.add(piece)
    return writer.close()


def _of_each(custom_ids: Iterable[str], items: Iterable[BatchItem]) -> Iterator[BatchItem]:
    """The item with each id, in the order of the ids."""
    found = {item.custom_id: item for item in items}
    for custom_id in custom_ids:
        yield found.get(custom_id) or BatchItem(custom_id, RequestStatus.MISSING)


def _by_position(batches: Sequence[Sequence[BatchItem]]) -> list[BatchItem]:
    """The batches' items. Those whose ids hold a position are in its order; the others stay where they are.

    Batches of several submits repeat positions. Then each batch is put in order by itself.
    """
    items = list(itertools.chain.from_iterable(batches))
    places = {place: position for place, item in enumerate(items) if (position := position_of(item.custom_id)) is not None}
    if len(set(places.values())) < len(places):
        return [item for batch in batches for item in _by_position([batch])]
    ordered = items.copy()
    for place, source in zip(places, sorted(places, key=places.__getitem__), strict=True):
        ordered[place] = items[source]
    return ordered


def _together(found: Iterable[Retrieval], items: list[BatchItem]) -> Retrieval:
    """One result with the sums of these results, and with these items."""
    tally, counts, faults = CostTally(), BatchCounts(), StreamFaults()
    for result in found:
        tally, counts, faults = tally + result.tally, counts + result.counts, faults + result.faults
    return Retrieval(items, tally, counts, faults)


def _counted(chunks: Iterator[bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        on_bytes(len(chunk))
        yield chunk


def _over(decision: TimedOut | GaveUp) -> BatchWaitTimeout | PollError:
    if isinstance(decision, TimedOut):
        return BatchWaitTimeout(
            f"{len(decision.open_ids)} of the batches did not end in time: {', '.join(decision.open_ids)}. "
            "They keep running and are billed as usual; waiting again costs nothing."
        )
    return PollError(f"Polling gave up: {decision.reason}. The batches are untouched; waiting again costs nothing.")


def _as_ids(batch_ids: str | Sequence[str]) -> list[str]:
    return [batch_ids] if isinstance(batch_ids, str) else list(dict.fromkeys(batch_ids))
