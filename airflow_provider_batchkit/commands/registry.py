"""The commands and their arguments, for ``python -m airflow_provider_batchkit`` and for ``airflow batchkit`` alike.

Airflow imports this module whenever one of its own commands runs, so nothing heavy is imported here: each command's module is imported when
the command runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow_provider_batchkit.progress import span_of

#: copies of airflow_provider_batchkit.ledger.overview and .spending, which load SQLAlchemy; a test compares them
STATES = ("open", "doubt", "sending", "submitted", "prepared", "gone", "landed", "rejected", "void")
GROUPS = ("day", "dag", "model")
_DESCRIPTION = "Message batches of Airflow tasks: what is in flight, what failed and why, what it cost."


class Argument:
    """An argument: its flags, and its further options for argparse."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.flags = flags
        self.options = options


@dataclass(frozen=True, slots=True)
class Command:
    """A command. ``run`` names its function as ``module:function``; the function takes the parsed arguments and returns the exit code."""

    name: str
    help: str
    run: str
    arguments: tuple[Argument, ...]
    description: str | None = None


def utc_time(text: str) -> datetime:
    """A date or time as a person types it (``2026-11-01``, ``2026-11-01T12:00``), in UTC unless it has an offset."""
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found


def span(text: str) -> timedelta:
    """A span of time as a person types it: ``90d`` or ``12h``."""
    try:
        return span_of(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


_LEDGER = Argument(
    "--conn-id",
    "--sql-conn-id",
    dest="conn_id",
    metavar="CONN",
    help="Airflow connection of the ledger: the ledger_conn_id of the tasks, or else their sql_conn_id",
)
_OUTPUT = Argument("-o", "--output", choices=("table", "json", "yaml", "plain"), default="table", help="output format")
_YES = Argument("-y", "--yes", action="store_true", help="do not ask")
_API = Argument("--anthropic-conn-id", metavar="CONN", help="connection to the API, by default the one that the batch was submitted with")
_DAG = Argument("--dag-id", metavar="DAG", help="only of this DAG")
_SINCE = Argument("--since", metavar="DATE", type=utc_time, help="not before this date or time (UTC), such as 2026-11-01")
_UNTIL = Argument("--until", metavar="DATE", type=utc_time, help="before this date or time (UTC)")
_LIMIT = Argument("--limit", metavar="N", type=int, default=50, help="at most so many, the latest (50)")
_FILTERS = (
    _DAG,
    Argument("--run-id", metavar="RUN", help="only of this DAG run"),
    Argument("--task-id", metavar="TASK", help="only of this task"),
    Argument("--state", choices=STATES, help="only with a batch in this state; open is what the API or a task is still at work on"),
    _SINCE,
    _UNTIL,
)

COMMANDS = (
    Command(
        "jobs",
        "list jobs, the latest first: a job is a task of a DAG run, over all its attempts",
        "look:jobs",
        (
            *_FILTERS,
            Argument("--model", metavar="MODEL", help="only billed for this model"),
            Argument("--failed", action="store_true", help="only with rows that have no whole answer"),
            _LIMIT,
            _LEDGER,
            _OUTPUT,
        ),
    ),
    Command(
        "batches",
        "list batches, the latest first; with --open what is in flight, how far and how old it is",
        "look:batches",
        (
            Argument("--open", action="store_true", dest="only_open", help="only what has not ended or landed"),
            *_FILTERS,
            _LIMIT,
            _LEDGER,
            _OUTPUT,
        ),
    ),
    Command(
        "failed",
        "why rows of a job failed, and what helps",
        "look:failed",
        (
            Argument("job", metavar="JOB", help="id of the job, as `jobs` and the task's log name it"),
            Argument("--rows", action="store_true", help="each row with its key, instead of the reasons"),
            Argument("--status", metavar="STATUS", help="with --rows: only rows with this outcome, such as errored or expired"),
            Argument("--error-type", metavar="TYPE", help="with --rows: only rows with this type of error, such as overloaded_error"),
            _LIMIT,
            _LEDGER,
            _OUTPUT,
        ),
    ),
    Command(
        "spend",
        "what landed batches cost and saved, and the budgets",
        "look:spend",
        (
            Argument("--by", choices=GROUPS, default="day", help="what to sum up by (day)"),
            _DAG,
            Argument(
                "--since", metavar="DATE", type=utc_time, help="batches created since this date (UTC); by default in the last 30 days"
            ),
            _UNTIL,
            _LEDGER,
            _OUTPUT,
        ),
    ),
    Command(
        "orphans",
        "batches of the workspace that no ledger knows",
        "workspace:orphans",
        (
            Argument(
                "--conn-id",
                "--sql-conn-id",
                dest="conn_id",
                metavar="CONN[,CONN]",
                help="connections of all ledgers of the workspace, by default those of [batchkit] page_ledger_conn_ids",
            ),
            Argument("--anthropic-conn-id", metavar="CONN", help="connection to look with, by default all that the ledgers name"),
            Argument(
                "--since", metavar="DATE", type=utc_time, help="created since this date (UTC); by default as long as the API keeps results"
            ),
            _OUTPUT,
        ),
        "Lists what the API shows of the workspace and no ledger has. It may be another deployment's or a person's, or of a shard that "
        "is in doubt. Name every ledger of the workspace.",
    ),
    Command(
        "cancel",
        "cancel a running batch",
        "workspace:cancel",
        (Argument("batch", metavar="BATCH", help="id of the batch"), _API, _LEDGER, _YES),
        "Says what it will do, and asks. What the batch has answered by then stays answered, is billed and lands.",
    ),
    Command(
        "settle",
        "decide what became of a shard that nothing proves",
        "settle:settle",
        (
            Argument("job", metavar="JOB", help="id of the job, as the task's log names it"),
            Argument("shard", metavar="SHARD", type=int, help="number of the shard in the job"),
            Argument("--void", action="store_true", help="it was never accepted: its rows are asked again"),
            Argument("--is", dest="batch_id", metavar="BATCH", help="this batch is its own"),
            Argument("--anthropic-conn-id", metavar="CONN", help="with --is: connection to look with, by default the shard's own"),
            _LEDGER,
            _YES,
        ),
        "Decides what became of a shard whose POST nobody saw end, or whose batch holds another's results: give --void or --is. It says "
        "what it will do and what that may cost, and asks.",
    ),
    Command(
        "ddl",
        "print the statements that create a ledger",
        "keep:ddl",
        (
            Argument("--dialect", metavar="NAME", help="of SQLAlchemy: postgresql, sqlite, mysql; by default the ledger connection's own"),
            _LEDGER,
        ),
        "For a database whose tables an administrator creates: tasks then need no right to create tables.",
    ),
    Command(
        "prune",
        "delete what is known of single rows of old jobs, where nothing needs it any more",
        "keep:prune",
        (
            Argument("--older-than", metavar="SPAN", type=span, required=True, help="jobs without a sign of life for so long, such as 90d"),
            _LEDGER,
            _YES,
            _OUTPUT,
        ),
        "Says what it deletes, what it keeps and why, and asks. Bills, budgets and the history of jobs and batches always stay. A run that "
        "is cleared afterwards pays nothing: its task fails, since nothing tells any more which rows it has paid for.",
    ),
)


def parser() -> argparse.ArgumentParser:
    """All commands, with their arguments."""
    root = argparse.ArgumentParser(prog="python -m airflow_provider_batchkit", description=_DESCRIPTION)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        one = commands.add_parser(command.name, help=command.help, description=command.description or _sentence(command.help))
        for argument in command.arguments:
            one.add_argument(*argument.flags, **argument.options)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code: 0 done; 1 refused, not confirmed or not possible; 2 arguments that are not valid."""
    return run(parser().parse_args(arguments))


def run(given: argparse.Namespace) -> int:
    """Run the parsed command; an error is printed as one line."""
    from airflow.providers.common.compat.sdk import AirflowException

    from airflow_provider_batchkit.exceptions import BatchKitError

    logging.getLogger("httpx2").setLevel(logging.WARNING)
    module, _, function = next(command.run for command in COMMANDS if command.name == given.command).partition(":")
    try:
        code: int = getattr(importlib.import_module(f"airflow_provider_batchkit.commands.{module}"), function)(given)
    except (BatchKitError, AirflowException) as e:
        print(e, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return code


def airflow_commands() -> list[Any]:
    """The commands as ``airflow batchkit …``, in the form that Airflow's command line takes (3.2 and later)."""
    from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

    def action(command: Command) -> ActionCommand:
        def call(given: argparse.Namespace) -> None:
            given.command = command.name
            code = run(given)
            if code:
                sys.exit(code)

        arguments = tuple(Arg(argument.flags, **argument.options) for argument in command.arguments)
        return ActionCommand(command.name, _sentence(command.help).removesuffix("."), call, arguments, command.description)

    return [GroupCommand("batchkit", "Message batches of Airflow tasks", [action(command) for command in COMMANDS], _DESCRIPTION)]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
