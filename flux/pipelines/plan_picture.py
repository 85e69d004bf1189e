"""A plan as a picture: a bar for each stage, of what takes its memory, with a line at what there is.

After a run, what a stage took stands as a thin bar below the one of its plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..memory.metering import StageActual
from ..memory.plan import RunPlan, StagePlan
from ..memory.policy import GIB

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw as Pen

__all__ = ["draw_plan", "spelled"]

MIB = 1 << 20
GROUND, INK, FAINT, LINE, OVER, TAKEN = "#1e1f22", "#e8e8e8", "#8a8d91", "#55585d", "#e5534b", "#c9ccd1"
STACK = (  # what a bar is made of, from the left: attribute, legend, colour
    ("resident_bytes", "weights that stay", "#4c8dd6"),
    ("ring_bytes", "buffers of streamed weights", "#56c2b6"),
    ("activations", "activations", "#e0a33e"),
    ("workspace", "unpacked at use", "#c773c9"),
    ("beside", "other models", "#8f97a3"),
)
WIDTH, MARGIN, LABEL, AMOUNT = 960, 20, 190, 96  # pixels
BAR, GAP, TOP, SCALE, LEGEND = 30, 20, 60, 34, 34
THIN, APART = 8, 4  # of a bar of what was taken, and above it
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


def draw_plan(plan: RunPlan, taken: Mapping[str, StageActual] | None = None) -> Image:
    """Draw a plan.

    Args:
        plan: Of a run.
        taken: What its stages took, by their keys; None before the run.

    Returns:
        An RGB picture, ``WIDTH`` pixels wide.
    """
    from PIL import Image, ImageDraw

    pitch = BAR + GAP + (THIN + APART if taken else 0)
    height = TOP + len(plan.stages) * pitch + SCALE + LEGEND + MARGIN
    picture = Image.new("RGB", (WIDTH, height), GROUND)
    pen = ImageDraw.Draw(picture)
    line = _line_of(plan)
    longest = max(plan.peak_bytes, *(stage.peak_bytes for stage in (taken or {}).values()), 1)
    ruler = _Ruler(int(HEADROOM * max(longest, line if line < 2 * longest else 0)))
    title = "memory plan and what was taken" if taken else "memory plan"
    _text(pen, (MARGIN, MARGIN), f"{title}: policy {plan.policy}, {plan.device}", SIZE)
    bottom = TOP + len(plan.stages) * pitch
    _scale(pen, ruler, bottom)
    for index, stage in enumerate(plan.stages):
        y = TOP + index * pitch
        _bar(pen, ruler, stage, y, line)
        if taken and stage.name in taken:
            _thin_bar(pen, ruler, taken[stage.name], y + BAR + APART)
        if stage.streamed_bytes:
            _streaming(pen, ruler, stage, y + pitch - GAP + APART // 2)
    if line <= ruler.most:
        x = ruler.at(line)
        pen.line((x, TOP - GAP // 2, x, bottom - GAP // 2), OVER, 2)
        what = "budget" if plan.policy.budget is not None else "free"
        _text(pen, (x, TOP - GAP), f"{what} {spelled(line)}", SMALL, OVER, "ms")
    _legend(pen, bottom + SCALE, plan, taken=bool(taken))
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


def _thin_bar(pen: Pen, ruler: _Ruler, taken: StageActual, y: int) -> None:
    end = ruler.at(taken.peak_bytes)
    pen.rectangle((ruler.at(0), y, max(ruler.at(0), end - 1), y + THIN), TAKEN)
    _text(pen, (end + ASIDE, y + THIN // 2), spelled(taken.peak_bytes), SMALL, TAKEN, "lm")


def _streaming(pen: Pen, ruler: _Ruler, stage: StagePlan, y: int) -> None:
    blocks = stage.footprint.blocks
    streamed = f"{len(blocks.streamed)} of {len(blocks.kept)} blocks are streamed, "
    _text(pen, (ruler.at(0), y), f"{streamed}{spelled(stage.streamed_bytes)} a pass", SMALL, FAINT)


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


def _legend(pen: Pen, y: int, plan: RunPlan, *, taken: bool) -> None:
    x = MARGIN + LABEL
    used = [row for row in STACK if row[0] != "beside" or any(stage.beside for stage in plan.stages)]
    for _, words, colour in (*used, *([("", "taken", TAKEN)] if taken else [])):
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
