"""The token model and the answers. A declared model that makes runs reproducible, not the truth about any tokenizer.

- ``input_tokens`` = ceil(UTF-8 bytes of all system and message text / 4) + 8. Only text counts: tools, images and documents are free.
- ``output_tokens`` = ceil(UTF-8 bytes of the answer / 4), at least 1, at most ``max_tokens``; an answer above that is cut.
- Caching: the system text up to the last block with ``cache_control`` is the cached prefix, ceil(bytes / 4) tokens of the input. It is
  written by every request until a batch with the same model and prefix has ended, and read by the batches accepted after that, for as
  long as its ttl. There is no minimum length, and markers on messages or at the top level do nothing.
"""

from __future__ import annotations

import hashlib

EXCERPT_CHARS = 60
DIGEST_CHARS = 12
OVERHEAD_TOKENS = 8


def tokens_of_bytes(size: int) -> int:
    """Tokens of ``size`` bytes of UTF-8 text: a quarter, rounded up."""
    return -(-size // 4)


def digest_of(prompt: str) -> str:
    """Twelve hexadecimal digits of SHA-256 that stand for the prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:DIGEST_CHARS]


def answer_from(digest: str, excerpt: str) -> str:
    """The answer to a prompt of which only digest and first characters are known."""
    return f"Answer {digest}: {excerpt}"


def answer_for(prompt: str) -> str:
    """The whole text that the simulator answers to a prompt (the text of the last user message; its text blocks are joined as they are)."""
    return answer_from(digest_of(prompt), prompt[:EXCERPT_CHARS])


def cut(text: str, tokens: int) -> str:
    """The longest start of ``text`` that the token model counts as at most ``tokens``, cut between characters."""
    return text.encode()[: 4 * tokens].decode(errors="ignore")
