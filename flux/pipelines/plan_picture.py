"""A plan as a picture: a bar for each stage, of what takes its memory, with a line at what there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..memory.plan import RunPlan, StagePlan
from ..memory.policy import GIB

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw as Pen

__all__ = ["draw_plan", "spelled"]

MIB = 1 << 20
GROUND, INK, FAINT, LINE, OVER = "#1e1f22", "#e8e8e8", "#8a8d91", "#55585d", "#e5534b"
STACK = (  # what a bar is made of, from the left: attribute, legend, colour
    ("resident_bytes", "weights that stay", "#4c8dd6"),
    ("ring_bytes", "buffers of streamed weights", "#56c2b6"),
    ("activations", "activations", "#e0a33e"),
    ("workspace", "unpacked at use", "#c773c9"),
)
WIDTH, MARGIN, LABEL, AMOUNT = 960, 20, 190, 96  # pixels
BAR, GAP, TOP, SCALE, LEGEND = 30, 20, 60, 34, 34
SIZE, SMALL = 15, 13  # of letters
ASIDE = 6  # of a bar or the line, where an amount stands
HEADROOM = 1.06  # of the scale beyond the longest bar
TICKS = (1, 2, 5)  # and their tenfolds, in GiB or MiB
MOST_TICKS = 8


@dataclass(frozen=True)
class _Ruler:
    """Bytes to pixels."""

    most: int

    def at(self, size: float) -> float:
        return MARGIN + LABEL + size / self.most * (WIDTH - 2 * MARGIN - LABEL - AMOUNT)


def draw_plan(plan: RunPlan) -> Image:
    """Draw a plan.

    Args:
        plan: Of a run.

    Returns:
        An RGB picture, ``WIDTH`` pixels wide.
    """
    from PIL import Image, ImageDraw

    height = TOP + len(plan.stages) * (BAR + GAP) + SCALE + LEGEND + MARGIN
    picture = Image.new("RGB", (WIDTH, height), GROUND)
    pen = ImageDraw.Draw(picture)
    line = _line_of(plan)
    ruler = _Ruler(int(HEADROOM * max(plan.peak_bytes, line if line < 2 * plan.peak_bytes else 0)))
    _text(pen, (MARGIN, MARGIN), f"memory plan: policy {plan.policy}, {plan.device}", SIZE)
    bottom = TOP + len(plan.stages) * (BAR + GAP)
    _scale(pen, ruler, bottom)
    for index, stage in enumerate(plan.stages):
        _bar(pen, ruler, stage, TOP + index * (BAR + GAP), line)
    if line <= ruler.most:
        x = ruler.at(line)
        pen.line((x, TOP - GAP // 2, x, bottom - GAP // 2), OVER, 2)
        what = "budget" if plan.policy.budget is not None else "free"
        _text(pen, (x, TOP - GAP), f"{what} {spelled(line)}", SMALL, OVER, "ms")
    _legend(pen, bottom + SCALE)
    return picture


def _line_of(plan: RunPlan) -> int:
    return plan.available if plan.policy.budget is None else plan.policy.budget


def _bar(pen: Pen, ruler: _Ruler, stage: StagePlan, y: int, line: int) -> None:
    _text(pen, (MARGIN + LABEL - 10, y + BAR // 2 - 7), stage.name, SIZE, anchor="rm")
    title = stage.title + (", in strips" if stage.in_strips else "")
    _text(pen, (MARGIN + LABEL - 10, y + BAR // 2 + 9), title, SMALL, FAINT, "rm")
    start = 0
    for attribute, _, colour in STACK:
        size = getattr(stage, attribute)
        pen.rectangle((ruler.at(start), y, max(ruler.at(start), ruler.at(start + size) - 1), y + BAR), colour)
        start += size
    x, words = ruler.at(start) + ASIDE, spelled(start)
    if start <= line <= ruler.most and x + pen.textlength(words, font=_font(SIZE)) > ruler.at(line) - ASIDE:
        x = ruler.at(line) + ASIDE
    _text(pen, (x, y + BAR // 2), words, SIZE, OVER if start > line else INK, "lm")
    if stage.streamed_bytes:
        streamed = f"{len(stage.footprint.blocks.streamed)} of {len(stage.footprint.blocks.kept)} blocks are streamed, "
        _text(pen, (ruler.at(0), y + BAR + 3), f"{streamed}{spelled(stage.streamed_bytes)} a pass", SMALL, FAINT)


def _scale(pen: Pen, ruler: _Ruler, bottom: int) -> None:
    unit = GIB if ruler.most >= GIB else MIB
    step = next(
        tick * 10**power for power in range(6) for tick in TICKS if ruler.most / unit / (tick * 10**power) <= MOST_TICKS
    )
    for count in range(int(ruler.most / unit / step) + 1):
        x = ruler.at(count * step * unit)
        pen.line((x, TOP - GAP // 2, x, bottom), LINE)
        _text(pen, (x, bottom + 4), f"{count * step}", SMALL, FAINT, "ma")
    _text(pen, (WIDTH - MARGIN, bottom + 4), "GiB" if unit == GIB else "MiB", SMALL, FAINT, "ra")


def _legend(pen: Pen, y: int) -> None:
    x = MARGIN + LABEL
    for _, words, colour in STACK:
        pen.rectangle((x, y, x + 12, y + 12), colour)
        _text(pen, (x + 18, y - 2), words, SMALL)
        x += 34 + round(pen.textlength(words, font=_font(SMALL)))


def _text(pen: Pen, place: tuple[float, float], words: str, size: int, colour: str = INK, anchor: str = "la") -> None:
    pen.text(place, words, colour, font=_font(size), anchor=anchor)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def spelled(size: int) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / MIB:.1f} MiB"
