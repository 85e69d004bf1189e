"""JSON out of files that anyone may have made: no name twice, and no more memory than was granted.

A text of three bytes can become an object of a few hundred, so that what it will take is estimated from above first.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["JSON_ALLOWANCE", "json_cost", "load_json"]

JSON_ALLOWANCE = 24 << 20  # bytes that a text may take when parsed, beyond what a caller grants

# What CPython 3.10 to 3.13 takes for each of these at most, in bytes: a table or list itself, a name with its place in
# the table and while the table is built, a value.
COSTS = {"{": 240, "[": 88, ":": 240, ",": 80}
NARROW, WIDE = 2, 8  # bytes for each of the text: decoded, and its strings taken out of it; of four each where wide


def json_cost(text: str | bytes) -> int:
    """Bytes that parsing a text takes at most; the text itself is not counted."""
    is_narrow = text.isascii() and (b"\\u" not in text if isinstance(text, bytes) else "\\u" not in text)
    marks = sum(
        cost * (text.count(mark.encode()) if isinstance(text, bytes) else text.count(mark))
        for mark, cost in COSTS.items()
    )
    return marks + (NARROW if is_narrow else WIDE) * len(text)


def load_json(text: str | bytes, granted: int = 0) -> Any:
    """What a JSON text says.

    Args:
        text: JSON, in UTF-8 where it is bytes.
        granted: Bytes of memory that it may take beyond ``JSON_ALLOWANCE``.

    Raises:
        ValueError: It is not JSON, a name stands twice in a table, a number is not finite, it is nested too deep, or it
            would take too much memory.
    """
    cost = json_cost(text)
    if cost > granted + JSON_ALLOWANCE:
        raise ValueError(f"it would take some {cost} bytes of memory")
    try:
        text = text.decode() if isinstance(text, bytes) else text  # of itself json would guess at UTF-16 and UTF-32
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in it")
    return table


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
