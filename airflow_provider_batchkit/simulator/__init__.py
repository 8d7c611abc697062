"""A Message Batches API server for demos and tests. It binds 127.0.0.1 only, behaves as the real API does in others' recordings, and shares
no code with the client side.

``Simulator`` runs it on a thread, ``SimulatorProcess`` and ``python -m airflow_provider_batchkit.simulator`` as a process. The controls of
a running simulator need no credentials, take and return JSON, and give errors in the API's shape:

- ``GET /_sim/stats``: ``calls`` per endpoint, ``statuses`` answered (``cut`` for none), ``posts`` (create calls, with any outcome),
  ``batches_accepted``, ``requests_accepted``, ``bill`` (per model: requests and tokens of what succeeded in batches that ended),
  ``bill_lines`` (the same per model and inference_geo), ``batches`` (oldest first, without deleted ones: id, workspace, size, status,
  created_at, first_custom_id), ``faults`` (``times`` still left, ``struck`` so far)
- ``GET /_sim/requests?batch=ID``: ``custom_ids`` in the order asked
- ``POST /_sim/faults`` adds a ``Fault``, ``DELETE /_sim/faults`` drops all
- ``POST /_sim/batches/ID/end``, ``…/expire``, ``…/archive``
- ``POST /_sim/batches/ID/hide`` with ``{"seconds": S}`` or ``{"calls": N}``: for so long the API's calls do not find the batch
- ``POST /_sim/advance`` with ``{"seconds": S}`` moves the clock forward
- ``GET /_sim/settings``, ``POST /_sim/settings`` with any fields of ``SimulatorSettings``
"""

from __future__ import annotations

from .faults import Fault, FaultList
from .outcomes import MARKERS
from .process import RemoteControl, SimulatorProcess
from .schema import answer_in_schema
from .server import Simulator
from .settings import SimulatorSettings
from .tokens import answer_for

__all__ = [
    "MARKERS",
    "Fault",
    "FaultList",
    "RemoteControl",
    "Simulator",
    "SimulatorProcess",
    "SimulatorSettings",
    "answer_for",
    "answer_in_schema",
]
