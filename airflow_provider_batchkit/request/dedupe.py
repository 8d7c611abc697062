"""Requests → shards on disk, each row once. Rows that an earlier attempt has asked are left out, and equal questions are asked once.

Memory: what :mod:`~airflow_provider_batchkit.request.marks` needs, and one piece of the requests.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from airflow_provider_batchkit.exceptions import RequestError
from airflow_provider_batchkit.progress import Progress
from airflow_provider_batchkit.request.block import RequestBlock
from airflow_provider_batchkit.request.marks import MARK_BYTES, MarkTable
from airflow_provider_batchkit.request.shards import ShardWriter
from airflow_provider_batchkit.source.keys import encode_key, key_values

log = logging.getLogger(__name__)

#: number of keys of earlier attempts and runs that are noted at a time
_CHUNK_ROWS = 512
#: hex digits of the digest that a journaled job's ``custom_id`` ends with, and of the part of it that fits into 64 bits
_DIGEST_CHARS = 40
_ANSWER_CHARS = 16


@dataclass(slots=True)
class RowCounts:
    """What became of a source's rows."""

    #: rows of the source
    rows: int = 0
    #: rows that share another row's request
    copies: int = 0
    #: rows that are left out because ``only`` does not name them
    passed_over: int = 0
    #: rows that an earlier attempt has in flight or landed
    known: int = 0
    #: known rows whose request would be another one now; they are not asked again
    changed: int = 0
    #: rows whose request an earlier run of the task has answered
    unchanged: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a source row from an earlier attempt of its job."""

    key: str
    custom_id: str
    shard: int
    #: whether its batch has not landed, so that a row with the same request can still be added to it
    open: bool


def dedupe(
    requests: Iterable[RequestBlock],
    known: Iterable[Known],
    writer: ShardWriter,
    folder: str,
    *,
    only: Iterable[str] | None = None,
    answered: Iterable[tuple[str, str]] = (),
    by_position: bool = False,
) -> RowCounts:
    """Write the rows that are not known yet into shards.

    :param known: rows of earlier attempts
    :param folder: holds files of this call
    :param only: keys of the rows to ask; None for all
    :param answered: (key, digest) of requests that earlier runs have answered, the latest first; the same requests are left out
    :param by_position: whether requests without a key of their own are known by their position in the source
    :returns: what became of the rows
    :raises RequestError: for a key that comes twice, and for a request without a key that had another position before
    """
    counts, progress = RowCounts(), Progress(log, "rendered")
    with closing(_Seen(folder, known, only, answered, by_position=by_position)) as seen:
        for block in requests:
            _write_block(block, seen, writer, counts)
            progress.add(len(block))
    progress.done()
    if counts.changed:
        log.warning(
            "%s rows have changed, or their prompt has, since an earlier attempt of this task asked about them. They are not asked again: "
            "within one DAG run a key is asked once.",
            f"{counts.changed:,}",
        )
    return counts


def _write_block(block: RequestBlock, seen: _Seen, writer: ShardWriter, counts: RowCounts) -> None:
    keys = _key_marks(block.keys)
    for row, before in enumerate(seen.new_keys.add_all(keys)):
        if before is not None:
            raise RequestError(
                f"row {counts.rows + row}: the key {block.keys[row]} came before, in row {before}. Keys must be unique, or one answer "
                "would overwrite another. Nothing was sent by this attempt.",
                position=counts.rows + row,
            )
    counts.rows += len(block)
    fresh = seen.to_ask(block, keys, counts)
    asked = seen.questions.add_all(_question_marks(fresh.custom_ids))
    writer.add(fresh.pick([row for row, question in enumerate(asked) if question is None]))
    for row, question in enumerate(asked):
        if question is not None:
            counts.copies += 1
            writer.add_copy(fresh[row], seen.shard_of(question, writer))


class _Seen:
    """Keys and questions of the job so far. Memory: 32 bytes a row, 96 for rows of earlier attempts."""

    def __init__(
        self,
        folder: str,
        known: Iterable[Known],
        only: Iterable[str] | None,
        answered: Iterable[tuple[str, str]],
        *,
        by_position: bool = False,
    ) -> None:
        """The parameters are those of :func:`dedupe`."""
        self._by_position = by_position
        self._answered_keys = MarkTable(Path(folder, "answered-keys"))
        #: number of an answered key → the beginning of its request's digest
        self._answers = array("Q")
        pairs = iter(answered)
        while batch := list(islice(pairs, _CHUNK_ROWS)):
            for (_, digest), later in zip(batch, self._answered_keys.add_all(_key_marks([key for key, _ in batch])), strict=True):
                if later is None:
                    self._answers.append(int(digest[:_ANSWER_CHARS], 16))
        self.new_keys = MarkTable(Path(folder, "new-keys"))
        self.questions = MarkTable(Path(folder, "questions"))
        self._known_keys = MarkTable(Path(folder, "known-keys"))
        self._known_questions = MarkTable(Path(folder, "known-questions"))
        self._only = None if only is None else MarkTable(Path(folder, "only-keys"))
        keys = iter(only or ())
        while self._only is not None and (part := list(islice(keys, _CHUNK_ROWS))):
            self._only.add_all(_key_marks(part))
        #: number of a known key → number of its question among the known ones
        self._asked = array("I")
        #: number of a question → the open shard that asks it
        self._shards = array("I")
        rows, known_questions = iter(known), 0
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            self._known_keys.add_all(_key_marks([row.key for row in chunk]))
            for asked in self._known_questions.add_all(_question_marks([row.custom_id for row in chunk])):
                self._asked.append(known_questions if asked is None else asked)
                known_questions += asked is None
            # A landed batch is not read again, so it cannot answer a new row: a new row with the same question asks it anew.
            shared = [row for row in chunk if row.open]
            for row, asked in zip(shared, self.questions.add_all(_question_marks([row.custom_id for row in shared])), strict=True):
                if asked is None:
                    self._shards.append(row.shard)

    def to_ask(self, block: RequestBlock, keys: bytes, counts: RowCounts) -> RequestBlock:
        """The requests of a block that must be asked; the others are counted.

        :param keys: marks of the block's keys
        """
        rows = list(range(len(block)))
        if self._only is not None:
            listed = self._only.find_all(keys)
            rows = [row for row in rows if listed[row] is not None]
            counts.passed_over += len(block) - len(rows)
        if self._asked:
            rows = self._unknown(block, keys, rows, counts)
        if self._answers:
            rows = self._unanswered(block, keys, rows, counts)
        return block.pick(rows)

    def _unknown(self, block: RequestBlock, keys: bytes, rows: list[int], counts: RowCounts) -> list[int]:
        """The places among ``rows`` that no earlier attempt has in flight or landed."""
        known, questions = self._known_keys.find_all(keys), self._known_questions.find_all(_question_marks(block.custom_ids))
        fresh = []
        for row in rows:
            key = known[row]
            if key is None:
                fresh.append(row)
            else:
                counts.known += 1
                if questions[row] != self._asked[key]:
                    counts.changed += 1
                    position = counts.rows - len(block) + row
                    if self._by_position and questions[row] is not None and block.keys[row] == encode_key([str(position)]):
                        raise _moved(position)
        return fresh

    def _unanswered(self, block: RequestBlock, keys: bytes, rows: list[int], counts: RowCounts) -> list[int]:
        """The places among ``rows`` whose requests an earlier run has not answered for their keys."""
        answered = self._answered_keys.find_all(keys)
        fresh = []
        for row in rows:
            key = answered[row]
            if key is not None and self._answers[key] == int(block.custom_ids[row][-_DIGEST_CHARS:][:_ANSWER_CHARS], 16):
                counts.unchanged += 1
            else:
                fresh.append(row)
        return fresh

    def shard_of(self, question: int, writer: ShardWriter) -> int:
        """The shard that asks a question: one of an earlier attempt, or one of ``writer``."""
        earlier = len(self._shards)
        return self._shards[question] if question < earlier else writer.shard_of(question - earlier)

    def close(self) -> None:
        for table in (self.new_keys, self.questions, self._known_keys, self._known_questions, self._answered_keys, self._only):
            if table is not None:
                table.close()


def _moved(position: int) -> RequestError:
    return RequestError(
        f"request {position} has no key, and in an earlier attempt of this task it had another position: the order of the requests has "
        "changed, and it would get the answer to another one. Nothing was sent by this attempt. Give the requests the order that they had "
        "and run the task again, or start a new DAG run; requests with a key or a custom_id of their own may come in any order.",
        position=position,
    )


def _key_marks(keys: Sequence[str]) -> bytes:
    """Marks of keys. Keys that a text column could not tell apart, such as 1 and "1", have the same mark.

    A mark is two of Python's own hashes, of 64 bits each and keyed by a secret of the process. They take half the time of a digest.
    """
    # the hashes are taken of bytes: Python gives some different strings the same hash
    texts = [(key[1:-1].strip('"') if "," not in key else "\x1f".join(map(str, key_values(key)))).encode() for key in keys]
    marks = array("q", bytes(MARK_BYTES * len(texts)))
    marks[::2] = array("q", map(hash, texts))
    marks[1::2] = array("q", map(hash, [text + b"\x1f" for text in texts]))
    return marks.tobytes()


def _question_marks(custom_ids: Sequence[str]) -> bytes:
    """The beginnings of the digests that the ``custom_id`` of a journaled job ends with."""
    return bytes.fromhex("".join([custom_id[-_DIGEST_CHARS : 2 * MARK_BYTES - _DIGEST_CHARS] for custom_id in custom_ids]))
