"""What a randomised run did, and everything that it found wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Doubts:
    """Ledger rows of which a later attempt had to find out whether they had been accepted. A row may have waited before it was proved."""

    total: int = 0
    proved: int = 0
    void: int = 0
    waited: int = 0

    def __str__(self) -> str:
        return f"{self.total} doubts settled ({self.proved} by proof, {self.void} by void; {self.waited} waited for a running batch)"


@dataclass
class Outcome:
    """Figures of a run."""

    seed: int
    database: str
    kills: Counter[str] = field(default_factory=Counter)
    #: kills of workers by the task that they worked on
    victims: Counter[str] = field(default_factory=Counter)
    #: stopped workers that were thawed while their retry was at work
    thawed_beside_retry: int = 0
    #: how often Airflow's scheduler ended by itself and was started again
    scheduler_ends: int = 0
    faults: int = 0
    #: batches that were hidden in the middle of their life
    hidden: int = 0
    clears: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    #: sum of the try numbers of all tasks
    attempts: int = 0
    doubts: Doubts = field(default_factory=Doubts)
    #: ledger rows per state
    states: Counter[str] = field(default_factory=Counter)
    #: ours, and somebody else's that the simulator still has
    batches: int = 0
    foreign: int = 0
    #: a row is asked once for each table
    asked: int = 0
    accepted: int = 0
    duplicates: int = 0
    lost: int = 0
    #: rows that hold the answer to another question than their own
    wrong: int = 0
    seconds: float = 0.0
    #: a sentence each
    violations: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """All figures in one line."""
        return (
            f"seed {self.seed} on {self.database}: {self.kills.total()} kills ({_listed(self.kills)}, of which {self.thawed_beside_retry} "
            f"thawed beside their retry; of workers on {_listed(self.victims)}), {self.scheduler_ends} ends of the scheduler, "
            f"{self.faults} faults, {self.hidden} hidings, "
            f"{self.clears.total()} clears ({_listed(self.clears)}); {self.runs} runs, {self.attempts} attempts, {self.doubts}; "
            f"{self.batches} batches ({_listed(self.states)} in the ledger) and {self.foreign} foreign ones, {self.asked} rows asked, "
            f"{self.accepted} requests accepted: {self.duplicates} duplicates, {self.lost} lost rows, "
            f"{self.wrong} answers under a wrong key or table, {len(self.violations)} violations; {self.seconds:.0f} s"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
