"""The randomised crash run: a real Airflow works through DAG runs while its workers and its triggerer are killed at random moments.

``python -m tests.crash.chaos --seed 1 --kills 100 --database postgres``

DAG runs go on, several at a time. In each, sibling tasks ask different questions about the same rows, in batches of one size, and land
the answers in tables of their own. Meanwhile SIGKILL hits a task process, its supervisor (the task goes on as an orphan beside its own
retry), both at once, or the triggerer; SIGSTOP hits a worker, which is thawed beside its own retry; tasks are cleared; the simulator cuts
connections, refuses calls, answers lists late and hides batches; somebody else's batches of the same size come and go in the workspace.

Then it stops, every run has to succeed, and four sets of books are compared: the rows asked, the simulator's, the result tables, the
ledger. The seed decides what is killed, when, and how; the machine's load decides what that hits, so a seed repeats a storm and not its
every lightning.

``dag`` is what Airflow runs, ``workers`` are its processes, ``fates`` says what is to become of them, ``weather`` is the API's side,
``clears`` what a person does, ``storm`` brings them together, ``books`` compares, ``report`` has the figures, ``run`` sets everything up.
"""

from __future__ import annotations

from tests.crash.chaos.dag import ROWS_PER_RUN, TABLES
from tests.crash.chaos.run import run_chaos

__all__ = ["ROWS_PER_RUN", "TABLES", "run_chaos"]
