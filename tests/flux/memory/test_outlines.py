"""Layers on the meta device with weights as a card would have them: what they make there, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from flux.errors import FileError
from flux.memory.outlines import Outlines
from flux.memory.tracing import trace
from flux.ops import devices
from flux.ops.packed import Linear
from flux.weights.binding import bind
from flux.weights.formats import chunks, products
from flux.weights.formats.base import DATA
from flux.weights.formats.floats import BF16
from flux.weights.formats.scaled import FP8_E4M3FN_SCALED, SCALE
from flux.weights.packed import Packed, PackedPart
from flux.weights.readers.file_bytes import FileBytes
from flux.weights.readers.gguf import GgufFile
from flux.weights.readers.safetensors import SafetensorsFile
from flux.weights.renames import Piece, Plan, Recipe
from flux.weights.sources import open_checkpoint
from tests.stored import suffix_of, write_stored

CARD, TURING, HOPPER = "cuda", (7, 5), (9, 0)
ROWS, COLUMNS, TOKENS = 512, 256, 4096  # of the weight, and of what it is multiplied with
CHUNK = 1 << 14  # numbers
TWO, FOUR = 2, 4  # bytes of a number in bf16 and fp32


class Alone(nn.Module):
    """One layer."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.layer = Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.layer(x)


def weight(row=FP8_E4M3FN_SCALED, kind=torch.float8_e4m3fn, **more):
    data = torch.empty(ROWS, COLUMNS, dtype=kind, device="meta")
    part = PackedPart(row, (ROWS, COLUMNS), {DATA: data, **more})
    return Packed((ROWS, COLUMNS), Recipe((Piece("w"),)), {"w": part})


def scaled():
    return weight(**{SCALE: torch.empty((), device="meta")})


@pytest.fixture
def card(monkeypatch):
    """What the one card is of, for this test; chunks are a small part of the weight."""
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", CHUNK)
    monkeypatch.setattr(products, "AT_A_TIME", CHUNK)

    def is_of(number):
        monkeypatch.setattr(devices, "_capability", lambda device: number if device.startswith(CARD) else (0, 0))

    return is_of


def peak_of(module, tokens, outlines=None):
    def prepare():
        x = torch.empty(tokens, COLUMNS, dtype=torch.bfloat16)
        return lambda: module(x)

    if outlines is None:
        return trace(module, prepare).peak
    with outlines.fitted(module):
        return trace(module, prepare).peak


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_card_without_units_for_fp8_unpacks_the_weight_in_chunks(card, tokens):
    card(TURING)
    numbers, out = TWO * ROWS * COLUMNS, TWO * tokens * ROWS
    taken = peak_of(Alone(), tokens, Outlines(CARD, {"layer.weight": scaled()}))
    assert taken == numbers + max(FOUR * CHUNK, out)


@pytest.mark.parametrize("tokens", [16, TOKENS])
def test_a_card_with_such_units_narrows_what_goes_in_and_unpacks_nothing(card, tokens):
    card(HOPPER)
    narrow, out = tokens * COLUMNS, TWO * tokens * ROWS
    scalars = 64  # bytes, of scales and of what they are made from
    taken = peak_of(Alone(), tokens, Outlines(CARD, {"layer.weight": scaled()}))
    assert 0 <= taken - narrow - max(TWO * min(CHUNK, tokens * COLUMNS), out) <= scalars


def test_weights_that_stand_as_they_are_used_take_nothing(card):
    card(HOPPER)
    module = Alone()
    plain = peak_of(module, TOKENS)
    assert plain == TWO * TOKENS * ROWS
    assert peak_of(module, TOKENS, Outlines(CARD, {"layer.weight": weight(BF16, torch.bfloat16)})) == plain


def test_a_module_is_as_it_was_also_after_a_failure(card):
    card(HOPPER)
    module, outlines = Alone(), Outlines(CARD, {"layer.weight": scaled()})
    seen = []

    def fail():
        with outlines.fitted(module):
            seen.append((module.layer.packed is not None, devices.capability("meta")))
            raise ValueError("for a test")

    with pytest.raises(ValueError, match="for a test"):
        fail()
    assert seen == [(True, HOPPER)]
    assert module.layer.packed is None
    assert devices.capability("meta") == (0, 0)


def test_outlines_that_take_the_same_are_equal():
    one, same = (Outlines(CARD, {"layer.weight": scaled()}) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Outlines("cuda:1", {"layer.weight": scaled()})
    assert one != Outlines(CARD, {"other.weight": scaled()})
    assert one != Outlines(CARD, {"layer.weight": weight(BF16, torch.bfloat16)})
    assert one.of({"layer.weight"}) == one
    assert not one.of(())


def spoil(path):
    """Every byte of a file's numbers 0xff: NaN in every scale. What is text stays."""
    file = GgufFile(path) if path.suffix == ".gguf" else SafetensorsFile(path)
    texts = ("comfy_quant", "quant_state.")
    spans = [(entry.start, entry.end) for name, entry in file.items() if not any(text in name for text in texts)]
    raw = bytearray(path.read_bytes())
    first = len(raw) - max(entry.end for entry in file.values())
    for start, end in spans:
        raw[first + start : first + end] = b"\xff" * (end - start)
    path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K", "nf4", "bf16"])
def test_outlines_of_a_file_are_made_by_its_header(tmp_path, monkeypatch, kind):
    path = tmp_path / f"x{suffix_of(kind)}"
    write_stored(path, {"layer.weight": torch.zeros(ROWS, COLUMNS)}, kind)
    spoil(path)
    plan = Plan({"layer.weight": Recipe((Piece("layer.weight"),))})
    bound = bind(plan, open_checkpoint(path), {"layer.weight": (ROWS, COLUMNS)}, "x")
    if kind != "bf16":
        with pytest.raises(FileError):
            bound["layer.weight"].packed()
    for way in ("_open", "_read", "tensor"):
        monkeypatch.setattr(FileBytes, way, _not_to_be_called)
    found = Outlines.of_file(bound, ["layer.weight"], torch.device(CARD), torch.bfloat16)
    assert bool(found) == (kind != "bf16"), "numbers that stand as they are used are not among them"
    taken, plain = peak_of(Alone(), 1, found), peak_of(Alone(), 1)
    assert taken >= TWO * ROWS * COLUMNS if found else taken == plain


def _not_to_be_called(*_):
    raise AssertionError("a file is read")


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K", "gguf:F16", "nf4", "bf16"])
def test_an_outline_is_what_is_stored(tmp_path, kind):
    path = tmp_path / f"x{suffix_of(kind)}"
    write_stored(path, {"layer.weight": torch.zeros(ROWS, COLUMNS)}, kind)
    source = open_checkpoint(path)["layer.weight"]
    stored, outline = source.stored(), source.outline(torch.device(CARD))
    assert {role: (own.shape, own.dtype) for role, own in outline.items()} == {
        role: (own.shape, own.dtype) for role, own in stored.items()
    }
    assert all(own.is_meta for own in outline.values())


class Twice(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.one = Linear(COLUMNS, COLUMNS, bias=False, dtype=torch.bfloat16)
            self.other = Linear(COLUMNS, COLUMNS, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.other(self.one(x))


def test_of_weights_that_take_the_same_one_is_unpacked(card, monkeypatch):
    """And the second one takes as much: it runs beside what the first one gave."""
    card(TURING)
    calls, decode = [], FP8_E4M3FN_SCALED.decode

    def counted(*given):
        calls.append(given)
        return decode(*given)

    row = replace(FP8_E4M3FN_SCALED, decode=counted)
    data = torch.empty(COLUMNS, COLUMNS, dtype=torch.float8_e4m3fn, device="meta")
    parts = {DATA: data, SCALE: torch.empty((), device="meta")}
    weights = {
        f"{name}.weight": Packed(
            (COLUMNS, COLUMNS), Recipe((Piece(name),)), {name: PackedPart(row, (COLUMNS, COLUMNS), parts)}
        )
        for name in ("one", "other")
    }
    outlines = Outlines(CARD, weights)
    first_out, numbers = TWO * 16 * COLUMNS, TWO * COLUMNS * COLUMNS
    for _ in range(2):
        assert peak_of(Twice(), 16, outlines) == first_out + numbers + FOUR * CHUNK
    assert len(calls) == 1
