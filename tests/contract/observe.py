"""The calls of a contract run, in an order that needs few batches, and the clearing up behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from . import plan
from .seen import Created, Look, Seen
from .wire import BATCHES, Answer, Api, NoAnswerError

#: a batch id that nobody has
UNKNOWN_BATCH = "msgbatch_000000000000000000000000"
#: the same for both of HELD_STEPS
IDEMPOTENCY_KEY = "batchkit-contract"
#: seconds that a new batch is looked for in the list, and that clearing up may take at least
LISTED_WITHIN_S = 60.0
CLEAR_S = 120.0
CREATE_TRIES = 3
#: between two tries of a create call that was throttled
LONGEST_PAUSE_S = 30.0
#: like a 429, it proves that nothing was accepted
OVERLOADED = 529


class Run:
    """One run against one address. ``seen`` fills while it goes; :meth:`clear` cancels and deletes what it has made."""

    def __init__(self, api: Api, *, wait_s: float, pause_s: float, say: Callable[[str], None]) -> None:
        """
        :param wait_s: seconds that batches are waited for, all together
        :param pause_s: seconds between two looks
        """
        self.seen = Seen(datetime.now(UTC))
        self._api = api
        self._pause_s = pause_s
        self._wait_s = wait_s
        self._until = time.monotonic() + wait_s
        self._say = say
        #: steps that create, sent and not answered yet
        self._in_doubt: list[str] = []

    def observe(self) -> None:
        """All calls. What has no answer is noted, and the rest goes on."""
        self._refusals()
        self._free_checks()
        held = [self._create(name, plan.body_of(plan.HELD), {"idempotency-key": IDEMPOTENCY_KEY}) for name in plan.HELD_STEPS]
        for created in filter(None, held):
            self._first_looks(created)
        answered = self._create("answered", plan.body_of({**plan.ANSWERED, **plan.LATE}))
        if answered is not None:
            self._first_looks(answered)
            self._say(f"Waiting for {answered.batch_id} to end, {self._wait_s:,.0f} s at the most.")
            self._wait(answered)
        for created in filter(None, held):
            self._wait(created)
        self._read_results(answered, next(filter(None, held), None))
        self._delete_one(answered)

    # --- the calls ----------------------------------------------------------------------------------------------------------------

    def _call(self, step: str, method: str, path: str, body: object = None, **options: Any) -> Answer | None:
        try:
            answer = self._api.call(method, path, body, **options)
        except NoAnswerError as e:
            self.seen.silent[step] = str(e)
            return None
        self.seen.answers[step] = answer
        return answer

    def _create(self, step: str, body: dict[str, Any] | bytes, headers: Mapping[str, str] | None = None) -> Created | None:
        self._in_doubt.append(step)
        tries = 1
        while True:
            sent_at = time.time()
            answer = self._call(step, "POST", BATCHES, body, headers=headers)
            if answer is None or (answer.status >= 500 and answer.status != OVERLOADED):
                return None
            if answer.status not in (429, OVERLOADED) or tries == CREATE_TRIES:
                break
            tries += 1
            time.sleep(min(self._pause_s, LONGEST_PAUSE_S))
        batch_id = answer.json.get("id")
        created = None
        if answer.status == 200:
            if not isinstance(batch_id, str):
                # a proxy's page: the API may have taken the call
                return None
            size = len(body["requests"]) if isinstance(body, dict) else 1
            created = Created(batch_id, step, sent_at, answer.at, size)
            self.seen.created.append(created)
        self._in_doubt.remove(step)
        return created

    def _refusals(self) -> None:
        self._call("wrong key", "GET", f"{BATCHES}?limit=1", key="sk-ant-not-a-key")
        self._call("unknown batch", "GET", f"{BATCHES}/{UNKNOWN_BATCH}")
        self._call("unknown results", "GET", f"{BATCHES}/{UNKNOWN_BATCH}/results")
        for name, body in plan.REFUSED.items():
            self._create(name, body)
        self._call("list after refusals", "GET", f"{BATCHES}?limit=1000")

    def _free_checks(self) -> None:
        counted = {name: plan.PLAIN[name] for name in ("model", "messages")}
        self._call("count", "POST", "/v1/messages/count_tokens", counted)
        self._call("count unknown model", "POST", "/v1/messages/count_tokens", {**counted, "model": plan.UNKNOWN_MODEL})
        self._call("count unknown member", "POST", "/v1/messages/count_tokens", {**counted, "max_token": 5})
        self._call("model", "GET", f"/v1/models/{plan.HAIKU}")
        self._call("unknown model", "GET", f"/v1/models/{plan.UNKNOWN_MODEL}")

    def _first_looks(self, created: Created) -> None:
        """What can be seen of a batch that runs; one that was made to be canceled is canceled then."""
        self._look(created)
        self._find_in_list(created)
        self._call(f"results while running, {created.step}", "GET", f"{BATCHES}/{created.batch_id}/results")
        self._call(f"delete while running, {created.step}", "DELETE", f"{BATCHES}/{created.batch_id}")
        if created.step != "answered":
            self._call(f"cancel, {created.step}", "POST", f"{BATCHES}/{created.batch_id}/cancel")

    def _look(self, created: Created) -> bool:
        """Whether the batch has ended."""
        answer = self._call(f"look, {created.step}", "GET", f"{BATCHES}/{created.batch_id}")
        if answer is not None:
            self.seen.looks.append(Look(created.batch_id, answer.at - created.made_at, answer))
            created.ended = answer.status == 200 and answer.json.get("processing_status") == "ended"
        return created.ended

    def _find_in_list(self, created: Created) -> None:
        until = time.monotonic() + LISTED_WITHIN_S
        self.seen.listed_after_s[created.step] = None
        while True:
            answer = self._call("list", "GET", f"{BATCHES}?limit=1000")
            if answer is not None and created.batch_id in {batch.get("id") for batch in answer.json.get("data", [])}:
                self.seen.listed_after_s[created.step] = answer.at - created.made_at
                return
            if time.monotonic() + self._pause_s > until:
                return
            time.sleep(min(self._pause_s, 2.0))

    def _wait(self, created: Created) -> None:
        while not created.ended:
            if self._look(created) or time.monotonic() + self._pause_s > self._until:
                return
            time.sleep(self._pause_s)

    def _read_results(self, answered: Created | None, held: Created | None) -> None:
        if answered is not None and answered.ended:
            self.seen.lines = self._lines("results", answered)
            self._lines("results again", answered)
        if held is not None and held.ended:
            self.seen.canceled_lines = self._lines("results of a canceled batch", held)

    def _lines(self, step: str, created: Created) -> list[dict[str, Any]]:
        """The lines of a batch that has ended. A 404 for them is noted as a look, and asked again."""
        while True:
            answer = self._call(step, "GET", f"{BATCHES}/{created.batch_id}/results")
            if answer is None or answer.status != 404 or time.monotonic() + self._pause_s > self._until:
                break
            self.seen.looks.append(Look(created.batch_id, answer.at - created.made_at, answer))
            time.sleep(self._pause_s)
        if answer is None or answer.status != 200:
            return []
        try:
            return [json.loads(line) for line in answer.body.split(b"\n") if line.strip()]
        except ValueError as e:
            self.seen.silent[step] = f"a result line is no JSON: {e}"
            return []

    def _delete_one(self, created: Created | None) -> None:
        if created is None or not created.ended:
            return
        answer = self._call("delete", "DELETE", f"{BATCHES}/{created.batch_id}")
        created.deleted = answer is not None and answer.status == 200
        self._call("look after delete", "GET", f"{BATCHES}/{created.batch_id}")
        self._call("list after delete", "GET", f"{BATCHES}?limit=1000")

    # --- clearing up --------------------------------------------------------------------------------------------------------------

    def clear(self) -> Iterator[str]:
        """Cancel what runs, delete what has ended. Gives a line for what is left behind."""
        left = [created for created in self.seen.created if not created.deleted]
        for created in left:
            if not created.ended:
                self._call(f"clear {created.batch_id}", "POST", f"{BATCHES}/{created.batch_id}/cancel")
        until = max(time.monotonic() + min(CLEAR_S, self._wait_s), self._until)
        for created in left:
            while not created.ended:
                if self._look(created) or time.monotonic() + self._pause_s > until:
                    break
                time.sleep(self._pause_s)
            answer = self._call(f"clear {created.batch_id}", "DELETE", f"{BATCHES}/{created.batch_id}") if created.ended else None
            created.deleted = answer is not None and answer.status in (200, 404)
            if not created.deleted:
                yield (
                    f"{created.batch_id} ({created.requests} requests) is left: it was canceled and had not ended. It costs at most what "
                    "the bound says, and can be deleted in the Claude Console."
                )
        for step in self._in_doubt:
            yield (
                f"The create call “{step}” had no answer. If the API took it, a batch of this key's workspace has been there since "
                f"{self.seen.began_at:%Y-%m-%d %H:%M:%S} UTC that is not named here: look for it in the Claude Console, and cancel it."
            )
