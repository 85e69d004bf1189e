"""JSON is read at a bounded cost, which is known before it is paid."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from flux.weights.json_text import JSON_ALLOWANCE, json_cost, load_json

LENGTH = 1 << 17  # characters of the texts that are measured
SLACK = 4096  # bytes that the measuring itself takes


def filled(piece: str) -> str:
    return f"[{piece * (LENGTH // len(piece))}0]"


GREEDY = {
    "empty tables": filled("{},"),
    "empty lists": filled("[],"),
    "lists of one": filled("[0],"),
    "tables of one": filled('{"":0},'),
    "tables of six": filled('{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0},'),
    "tables in tables": filled('{"":' * 900 + "0" + "}" * 900 + ","),
    "lists in lists": filled("[" * 900 + "]" * 900 + ","),
    "floats": filled("1e1,"),
    "whole numbers": filled("257,"),
    "short texts": filled('"ab",'),
    "one wide character": json.dumps(["x" * LENGTH + "\U0001f600"], ensure_ascii=False),
    "one wide character, escaped": json.dumps(["x" * LENGTH + "\U0001f600"]),
    "one text": json.dumps("x" * LENGTH),
    "many names": json.dumps({f"{number:x}": 0 for number in range(15_000)}),
    "a header": json.dumps(
        {f"{n:x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(LENGTH // 64)}
    ),
}


@pytest.mark.parametrize("encode", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("text", GREEDY.values(), ids=GREEDY)
def test_no_text_takes_more_than_it_is_said_to(text, encode):
    own = encode(text)
    tracemalloc.start()
    value = load_json(own, granted=1 << 40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert value == json.loads(text)
    assert peak <= json_cost(own) + SLACK


def test_a_header_of_a_real_model_costs_a_small_part_of_what_is_allowed():
    entry = {"dtype": "BF16", "shape": [3072, 12288], "data_offsets": [10**10, 2 * 10**10]}
    text = json.dumps({f"double_blocks.{n}.img_attn.norm.query_norm.scale": entry for n in range(2_000)})
    assert json_cost(text.encode()) < JSON_ALLOWANCE / 4


def test_a_text_that_would_take_more_is_refused_before_it_does():
    text = GREEDY["empty tables"].encode() * 8
    tracemalloc.start()
    with pytest.raises(ValueError, match="it would take some"):
        load_json(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 16


def test_what_is_granted_is_added_to_what_is_allowed():
    text = json.dumps("x" * (JSON_ALLOWANCE // 2))
    with pytest.raises(ValueError, match="it would take some"):
        load_json(text)
    assert load_json(text, granted=100).startswith("xx")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "stands twice"),
        ('{"b": {"a": 1, "a": 1}}', "stands twice"),
        ("[NaN]", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[" * 100_000, "nested too deep"),
        ("[1", "delimiter"),
        (b"\xff\xfe[\x001\x00]\x00", "decode"),
        (b'"\xed\xa0\x80"', "decode"),
    ],
)
def test_what_json_or_python_would_let_pass_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        load_json(text)
