"""The token model and the answers. The model is a convention that makes runs reproducible; it does not describe a real tokenizer.

- ``input_tokens`` = ceil(UTF-8 bytes of all system and message text / 4) + 8. Only text counts: tools, images and documents are free.
- ``output_tokens`` = ceil(UTF-8 bytes of the answer / 4), at least 1, at most ``max_tokens``; an answer above that is cut. With the setting
  ``answer_tokens`` a shorter text is filled up.
- Caching: the system text up to each block with ``cache_control`` is a prefix, ceil(bytes / 4) tokens of the input. A prefix below the
  model's minimum (:func:`cache_minimum`) is plain input. A request finds a prefix when a request of the same workspace, model, ttl and
  prefix had ended before this one's batch was accepted, and no longer ago than the ttl; each use restarts the ttl. The request reads the
  longest prefix that it finds, and writes the longer marked ones. The requests of one batch run at the same time, and each writes for
  itself; with ``cache_concurrency`` N only N requests write, and those after them in the batch read. Markers on messages or at the top
  level do nothing.

The cache models what a cold batch and a primed one pay; it is not a measurement. It does not claim to know how many requests of a batch the
API runs at once, when in a batch's life its requests run (here reads are decided when the batch is accepted, and writes can be read once it
has ended), that a warm prefix is always read (the API's documentation calls cache hits in batches best effort), or where the cache is kept.
"""

from __future__ import annotations

import hashlib

EXCERPT_CHARS = 60
DIGEST_CHARS = 12
OVERHEAD_TOKENS = 8
_FILLER = ". A model would write something of use here"

#: Start of a model's name → tokens of the shortest prefix that is cached. The source is the API's documentation of prompt caching as quoted
#: by others in 2026. It lacks the newest models, for which the default is a guess.
_CACHE_MINIMUMS = {
    **dict.fromkeys(("claude-opus-4-5", "claude-opus-4-6", "claude-haiku-4-5"), 4096),
    **dict.fromkeys(("claude-opus-4-7", "claude-haiku-3-5", "claude-3-5-haiku", "claude-3-haiku"), 2048),
    **dict.fromkeys(("claude-opus-5", "claude-fable-5", "claude-mythos-5"), 512),
}
_CACHE_MINIMUM = 1024


def cache_minimum(model: str) -> int:
    """Number of tokens of the shortest prefix that the model caches."""
    return next((tokens for name, tokens in _CACHE_MINIMUMS.items() if model.startswith(name)), _CACHE_MINIMUM)


def tokens_of_bytes(size: int) -> int:
    """Tokens of ``size`` bytes of UTF-8 text: a quarter, rounded up."""
    return -(-size // 4)


def digest_of(prompt: str) -> str:
    """Twelve hexadecimal digits of SHA-256 that stand for the prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:DIGEST_CHARS]


def answer_from(digest: str, excerpt: str) -> str:
    """The answer to a prompt, made from the prompt's digest and its first characters."""
    return f"Answer {digest}: {excerpt}"


def answer_for(prompt: str) -> str:
    """The whole text that the simulator answers to a prompt (the text of the last user message; its text blocks are joined as they are)."""
    return answer_from(digest_of(prompt), prompt[:EXCERPT_CHARS])


def filled(text: str, tokens: int) -> str:
    """The text, filled up until the token model counts it as ``tokens``. A longer text stays as it is."""
    missing = 4 * tokens - len(text.encode())
    return text + (_FILLER * (missing // len(_FILLER) + 1))[:missing] if missing > 0 else text


def cut(text: str, tokens: int) -> str:
    """The longest start of ``text`` that the token model counts as at most ``tokens``, cut between characters."""
    return text.encode()[: 4 * tokens].decode(errors="ignore")
