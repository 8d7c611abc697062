"""All facts. The last list is what a run cannot test within a dollar and half an hour: it waits for another day, account or fault."""

from __future__ import annotations

from . import facts_create, facts_life, facts_lines
from .seen import Fact

UNTESTABLE = [
    Fact("results-for-29-days", "archived after 29 days, then 404", "jobs/fetch.py: gone", why="takes 29 days"),
    Fact("expired-requests", "expired lines after 24 h", "rounds ask them again", why="a batch this small ends long before"),
    Fact("late-acceptance", "a POST whose connection broke may make a batch later", "settle_seconds", why="needs a broken connection"),
    Fact("credit-too-low", 'invalid_request_error "Your credit balance is too low …"', "request/failures.py", why="needs an empty account"),
    Fact("usage-limit", '"You have reached your specified API usage limits …"', "request/failures.py", why="needs a limit that is reached"),
    Fact("download-failed", '"Unable to download the file …" for a URL', "request/failures.py", why="needs a server that fails on purpose"),
    Fact("queue-429", "429 at create when the queue is full", "api/calls.py sends it again later", why="needs a full queue"),
    Fact("too-large", "413, perhaps below 256 MB", "request/shards.py", why="uploads a quarter of a gigabyte"),
    Fact("limit-of-requests", "100,000 requests a batch", "request/shards.py", why="its bound is above the cap"),
    Fact(
        "refusals-unbilled",
        "a refusal before any output costs nothing",
        "cost/prices.py",
        why="usage shows its tokens; only the invoice tells",
    ),
    Fact("half-price", "half of the standard price", "cost/prices.py", why="only the invoice tells"),
    Fact("iterations", "with compaction the bill is the sum of usage.iterations", "cost/tally.py", why="nothing bounds its cost"),
    Fact(
        "pause-turn", "stop_reason pause_turn is unfinished", "UNFINISHED in model.py", why="needs server tools, whose cost nothing bounds"
    ),
    Fact("web-search", "server_tool_use counts searches", "cost/prices.py", why="nothing bounds the tokens that a search reads"),
    Fact("gateway", "results_url names the API's host also behind a gateway", "api/results.py", why="needs a gateway"),
    Fact("other-workspace", "a key of another workspace sees none of ours", "jobs/settle.py: the witness", why="needs a second key"),
]

FACTS = [*facts_create.FACTS, *facts_life.FACTS, *facts_lines.FACTS, *UNTESTABLE]
