"""The shared poller: all triggers of one connection in a process (strictly: on an event loop) look at their batches together.

A trigger calls only :func:`ended`. The first trigger of a connection starts a task with one client; the last one to leave ends it. A
trigger is woken only when every batch of its own has ended, its deadline has come, or looking is hopeless. When the API refuses to show a
batch and the connection has another key by now, the batch's triggers move to a new poller, which has a client with that key.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from airflow_provider_batchkit.api.polling import Decision, Ended, PollState, Wait
from airflow_provider_batchkit.exceptions import PollError
from airflow_provider_batchkit.hooks.batchkit import BatchKitHook
from airflow_provider_batchkit.triggers.looking import Looker
from airflow_provider_batchkit.triggers.watches import Look, Watch, Watches

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

log = logging.getLogger(__name__)

#: seconds that a new trigger's first look waits for further triggers: a triggerer that starts brings them all within moments
_GATHER_S = 0.1
#: triggers that are updated before other work of the event loop gets its turn; this takes 2 to 5 ms
_CHUNK = 100
#: seconds that the last trigger to leave waits for the client to close
_CLOSE_S = 5.0

#: The pollers that can be joined. Weak keys would not free closed loops: a poller's task refers to its loop, so a loop that was closed with
#: unfinished tasks would stay forever. Pollers of closed loops are dropped whenever a poller starts.
_pollers: dict[tuple[asyncio.AbstractEventLoop, str], SharedPoller] = {}


async def ended(
    conn_id: str, state: PollState, tell: Callable[[str], None] = log.warning, inform: Callable[[str], None] = log.info
) -> Decision:
    """Wait, together with all other waiters on this connection, until ``state`` decides anything but to wait.

    :param conn_id: connection of type ``anthropic``
    :param state: the batches and their ``deadline``, in seconds since the epoch
    :param tell: called with each line of the state's news, in the caller's context, so that its log lines are the caller's
    :param inform: called in the same way, with the progress of the batches
    :raises PollError: when the connection cannot be used, or the poller has failed
    """
    if not state.open_ids():
        return Ended()
    loop, own = asyncio.get_running_loop(), contextvars.copy_context()
    while True:
        poller = _pollers.get((loop, conn_id))
        if poller is None:
            for key in [key for key in list(_pollers) if key[0].is_closed()]:
                _pollers.pop(key, None)
            poller = _pollers[loop, conn_id] = SharedPoller(loop, conn_id)
        decision = await poller.wait(state, lambda line: own.run(tell, line), lambda line: own.run(inform, line))
        if decision is not None:
            return decision


class SharedPoller:
    """One connection's poller on one event loop. It can be joined until its last trigger leaves; the next one starts another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, conn_id: str) -> None:
        self._loop = loop
        self._conn_id = conn_id
        self._watches = Watches()
        self._waiting: dict[Watch, asyncio.Future[Decision | None]] = {}
        self._tell: dict[Watch, tuple[Callable[[str], None], Callable[[str], None]]] = {}
        self._joined = asyncio.Event()
        self._resting_until = float("-inf")
        # the task has its own context: it outlives the trigger that starts it, and its log lines are not that trigger's
        self._task = loop.create_task(self._run(), name=f"batchkit-poller-{conn_id}", context=contextvars.Context())
        self._task.add_done_callback(self._over)

    async def wait(self, state: PollState, tell: Callable[[str], None], inform: Callable[[str], None]) -> Decision | None:
        """Join, and leave when there is a decision or the caller is canceled. None: the caller must move to another poller."""
        clock = self._loop.time()
        watch = self._watches.join(state, due=clock + _GATHER_S, now=time.time(), clock=clock)
        future: asyncio.Future[Decision | None] = self._loop.create_future()
        self._waiting[watch], self._tell[watch] = future, (tell, inform)
        if watch.due < self._resting_until:
            self._joined.set()
        try:
            return await future
        finally:
            await self._leave(watch)

    async def _leave(self, watch: Watch) -> None:
        """Stop watching. The last trigger to leave ends the task, and waits until its client is closed."""
        premature = watch in self._waiting
        if premature:
            self._drop(watch)
        if self._waiting or self._loop.is_closed():  # on a closed loop the trigger was thrown away unfinished
            return
        if premature:
            self._task.cancel()
        await asyncio.wait([self._task], timeout=_CLOSE_S)

    async def _run(self) -> None:
        client = await self._client()
        try:
            looker = Looker(client, self._conn_id)
            while self._waiting:
                await self._rest()
                await self._round(looker)
        finally:
            self._close_door()
            if not self._loop.is_closed():  # a closed loop has closed its connections and cannot wait
                await client.close()

    async def _client(self) -> AsyncAnthropic:
        try:
            return await BatchKitHook(self._conn_id).get_async_conn()
        except Exception as e:
            raise PollError(
                f"The connection {self._conn_id!r} cannot be used: {str(e) or repr(e)}. "
                "The batches are untouched; waiting again costs nothing."
            ) from e

    async def _rest(self) -> None:
        """Sleep until the next look is due. A new trigger may make that earlier."""
        while (until := self._watches.next_due()) > self._loop.time():
            self._resting_until = until
            self._joined.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._joined.wait()
            except TimeoutError:
                break
        self._resting_until = float("-inf")

    async def _round(self, looker: Looker) -> None:
        clock = self._loop.time()
        due = self._watches.due(clock)
        if self._watches.paused(clock):
            for watch in due:
                self._settle(watch, self._watches.hold(watch, now=time.time(), clock=clock))
            return
        look = Look(clock)
        await looker.look(look, self._watches.wanted(due), self._watches)
        if look.refused and await self._has_another_key(looker):
            self._close_door()
            for watch in [watch for watch in self._watches.concerned(due, look) if look.refuses(watch) and watch in self._waiting]:
                self._wake(watch, None)
            if look.hopeless:
                return
        clock = self._loop.time()
        pause = self._watches.judge_connection(due, look, clock)
        if look.failure is not None and pause is not None:
            log.warning(
                "Looking at the batches of connection %r failed: %s. %d triggers wait; next look in %.1f s.",
                self._conn_id, look.failure.error, len(self._waiting), pause,
            )  # fmt: skip
        for number, watch in enumerate(self._watches.concerned(due, look), start=1):
            if watch in self._waiting:  # the trigger may have left meanwhile
                self._settle(watch, self._watches.tell(watch, look, now=time.time(), clock=clock))
            if number % _CHUNK == 0:
                await asyncio.sleep(0)

    def _settle(self, watch: Watch, decision: Decision) -> None:
        """Pass the news to the trigger, and wake it unless the decision is to wait."""
        tell, inform = self._tell[watch]
        for line in watch.state.news():
            tell(line)
        if (progress := watch.state.progress(time.time())) is not None:
            inform(progress)
        if isinstance(decision, Wait):
            return
        self._wake(watch, decision)

    def _wake(self, watch: Watch, decision: Decision | None) -> None:
        future = self._waiting[watch]
        self._drop(watch)
        if not future.done():
            future.set_result(decision)

    async def _has_another_key(self, looker: Looker) -> bool:
        """Whether the connection has other credentials, or another address, than the client that looks."""
        try:
            client = await self._client()
        except PollError:
            return False
        async with client:
            return not looker.is_as(client)

    def _drop(self, watch: Watch) -> None:
        self._watches.leave(watch)
        del self._waiting[watch], self._tell[watch]
        if not self._waiting:
            self._close_door()

    def _close_door(self) -> None:
        """Let no more triggers join. The next one starts another poller, with another client."""
        if _pollers.get((self._loop, self._conn_id)) is self:
            del _pollers[self._loop, self._conn_id]

    def _over(self, task: asyncio.Task[None]) -> None:
        """Wake every trigger that still waits when the task has ended for any reason, or they would wait forever."""
        self._close_door()
        cause = None if task.cancelled() else task.exception()
        if cause is not None:
            log.error("The shared poller of connection %r ended: %s", self._conn_id, cause, exc_info=cause)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._broken(cause))

    def _broken(self, cause: BaseException | None) -> PollError:
        if isinstance(cause, PollError):
            error = PollError(str(cause))
        else:
            error = PollError(
                f"The poller that the triggers of connection {self._conn_id!r} share "
                f"{'was canceled' if cause is None else f'ended unexpectedly: {cause!r}'}. "
                "The batches are untouched; waiting again costs nothing."
            )
        error.__cause__ = cause
        return error
