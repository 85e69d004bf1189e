"""What a part of a file is, from the shapes of its tensors under our names, and what shapes leave open.

Sizes, depth, input channels and guidance are read off the shapes and compared with the rows of ``flux1``, ``flux2``,
``autoencoder``, ``text`` and ``vision``. What shapes cannot tell comes from the user's word, then from metadata, then
from the file's name, then it is the usual one; notes say what was assumed.

Some formats store weights with rows and columns filled up to whole blocks of 16 or 32, and their shapes may come with
the filling. All sides of matrices that are compared with a release's are multiples of 32, so that nothing was filled
there. For models of other sizes the width of the token stream and rows of layers are read off biases, which are never
packed; FLUX.2 has none, and there the width is cut to whole heads of 128, of which any quarter is a multiple of 32
again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import MismatchError, UserError
from .autoencoder import AUTOENCODERS, RECOGNISED_AUTOENCODERS, AutoencoderSpec
from .flux1 import FLUX1, Flux1Spec
from .flux2 import FLUX2, Flux2Spec
from .foreign import Foreign, HasShape, find_foreign
from .releases import PART_TITLES
from .text import CLIP_TEXT, T5_ENCODERS, ClipTextSpec, T5Spec
from .vision import REDUXES, VISION_TOWERS, ReduxSpec, SiglipSpec

__all__ = ["AnySpec", "Recognised", "TransformerSpec", "recognise_foreign", "recognise_part", "titles_of"]

TransformerSpec = Flux1Spec | Flux2Spec
AnySpec = TransformerSpec | AutoencoderSpec | ClipTextSpec | T5Spec | SiglipSpec | ReduxSpec
Shapes = Mapping[str, tuple[int, ...]]
Value = int | float | bool
Fields = dict[str, Value]


@dataclass(frozen=True)
class Recognised:
    """What was found.

    Attributes:
        kind: "transformer", "autoencoder", "clip", "t5", "vision", "redux", or "foreign".
        title: For people, with an article.
        spec: None for what is foreign.
        notes: What was assumed and why, and what else to know.
        runs: Whether the engine runs it; some of what it does not run it reads and converts.
        foreign: What is known of it when it is foreign.
    """

    kind: str
    title: str
    spec: AnySpec | None = None
    notes: tuple[str, ...] = ()
    runs: bool = True
    foreign: Foreign | None = None

    @property
    def role(self) -> str:
        """What it does in a run: its kind, or that of ``Foreign.role``."""
        return self.kind if self.foreign is None else self.foreign.role

    @property
    def is_model(self) -> bool:
        """Whether it is a whole diffusion model, of whatever family, rather than something that goes with one."""
        return self.role in ("transformer", "model")


UNKNOWN = "of no kind that is known here"


def titles_of(found: Iterable[Recognised]) -> str:
    """What a file is as a whole, behind "is"."""
    return " and ".join(part.title for part in found) or UNKNOWN


@dataclass(frozen=True)
class _Hints:
    """What is known beyond shapes."""

    file_name: str
    metadata: Mapping[str, str]
    variant: str | None

    @property
    def file(self) -> str:
        return self.file_name or "the file"


def recognise_part(
    part: str,
    family: str,
    shapes: Shapes,
    *,
    file_name: str = "",
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> Recognised:
    """What a part is.

    Args:
        part: "transformer", "autoencoder", "clip", "t5", "vision" or "redux".
        family: "flux1" or "flux2", by its layout's names; "" to tell it by the shapes.
        shapes: Of its tensors, unpacked, under our names without prefix. Missing ones never raise.
        file_name: Where it was found, for hints and messages.
        metadata: The file's own texts.
        variant: The name of a transformer's spec, by the user's word; other parts have no variants.

    Returns:
        A part of kind "foreign" where its sizes are none that the engine knows, or tell too little.

    Raises:
        UserError: There is no such variant.
        MismatchError: The shapes contradict the variant.
    """
    hints = _Hints(file_name, metadata or {}, variant if part == "transformer" else None)
    if part == "transformer":
        return _transformer(family or ("flux2" if SHARED_MODULATION in shapes else "flux1"), shapes, hints)
    return PARTS[part](shapes, hints)


def recognise_foreign(tensors: Mapping[str, HasShape]) -> Recognised | None:
    """What a file is that holds no transformer of ours, by its own names and shapes; None when nothing is known."""
    found = find_foreign(tensors)
    return None if found is None else _foreign(found)


def _foreign(foreign: Foreign, *notes: str) -> Recognised:
    return Recognised("foreign", foreign.title, notes=notes, runs=False, foreign=foreign)


# Shapes.

BLOCK_NUMBER = re.compile("[0-9]{1,4}")  # far more blocks than any model has


def _side(shapes: Shapes, name: str, dimension: int = 0) -> int:
    """One side of a tensor's shape; 0 where there is no such tensor or side."""
    shape = shapes.get(name, ())
    return shape[dimension] if dimension < len(shape) else 0


def _rows(shapes: Shapes, layer: str) -> int:
    """Features that a layer puts out: of its bias, if it has one, for a packed weight may have more rows."""
    return _side(shapes, f"{layer}.bias") or _side(shapes, f"{layer}.weight")


def _numbers(shapes: Shapes, lead: str) -> set[int]:
    """The numbers that stand behind a lead in any name."""
    words = {name[len(lead) :].split(".", 1)[0] for name in shapes if name.startswith(lead)}
    return {int(word) for word in words if BLOCK_NUMBER.fullmatch(word)}


def _gap(shapes: Shapes, leads: Iterable[str]) -> str:
    """The first numbered block that is missing before another that is there; empty for none."""
    for lead in leads:
        found = _numbers(shapes, lead)
        missing = next((number for number in range(len(found)) if number not in found), None)
        if missing is not None:
            return f"{lead}{missing}"
    return ""


# Transformers.

SHARED_MODULATION = "double_stream_modulation_img.lin.weight"
BLOCKS = ("double_blocks.", "single_blocks.")
LABELS = {  # of fields, for messages
    "in_channels": "input channels",
    "out_channels": "output channels",
    "context_width": "width of the text tokens",
    "pooled_width": "width of CLIP's vector",
    "hidden": "width of the token stream",
    "heads": "attention heads",
    "double_blocks": "double blocks",
    "mlp_ratio": "width of the feed-forward layers",
    "guidance_embedding": "guidance embedding",
}
FREE = frozenset({"hidden", "heads", "double_blocks", "single_blocks", "mlp_ratio"})  # another size may differ in these
MAY_BE_ZERO = frozenset({"guidance_embedding", "single_blocks"})


@dataclass(frozen=True)
class _Family:
    """What sets the families apart.

    Attributes:
        title: Of the family.
        rows: Its releases.
        feed_forward: Rows of a block's first feed-forward layer for each unit of its width: 2 with a gate.
        nearest: Of a model of another size, the fields that the release which it is treated as has in common with it;
            the first set that any release has.
        runs: Whether the engine runs it.
    """

    title: str
    rows: Mapping[str, TransformerSpec]
    feed_forward: int
    nearest: tuple[tuple[str, ...], ...]
    runs: bool


FAMILIES: dict[str, _Family] = {
    "flux1": _Family(
        "FLUX.1",
        FLUX1,
        feed_forward=1,
        nearest=(("in_channels", "guidance_embedding", "context_width"), ("in_channels", "guidance_embedding")),
        runs=True,
    ),
    "flux2": _Family(
        "FLUX.2",
        FLUX2,
        feed_forward=2,
        nearest=(  # the width of the text tokens tells the language model
            ("in_channels", "context_width", "guidance_embedding"),
            ("in_channels", "context_width"),
            ("in_channels", "guidance_embedding"),
        ),
        runs=False,
    ),
}


def _transformer(name: str, shapes: Shapes, hints: _Hints) -> Recognised:
    family = FAMILIES[name]
    fields = _fields(family, shapes)
    chosen = _chosen(family, fields, hints)
    gap = _gap(shapes, BLOCKS)
    if gap:
        return _not_run(name, family, f"it is not whole: {gap} is missing")
    fitting = [row for row in family.rows.values() if not _differing(row, fields)]
    if chosen in fitting or (fitting and chosen is None):
        spec, notes = _choose(fitting, chosen, hints)
    else:
        another = _another_size(family, fields, chosen, hints)
        if isinstance(another, str):
            return _not_run(name, family, another)
        spec, notes = another
    return Recognised("transformer", f"the {spec.title} diffusion model", spec, notes, family.runs)


def _not_run(name: str, family: _Family, reason: str) -> Recognised:
    title = f"a diffusion model like {family.title} that cannot be run here ({reason})"
    return _foreign(Foreign(role="model", title=title, family=name))


def _fields(family: _Family, shapes: Shapes) -> Fields:
    """The spec's fields that shapes tell; 0 stands for what is not there."""
    norm = "double_blocks.0.img_attn.norm.key_norm."
    head = _side(shapes, f"{norm}scale") or _side(shapes, f"{norm}weight")
    rows = _rows(shapes, "img_in")
    heads = rows // head if head else 0
    hidden = rows if "img_in.bias" in shapes else heads * head
    fields: Fields = {
        "in_channels": _side(shapes, "img_in.weight", 1),
        "out_channels": _rows(shapes, "final_layer.linear"),
        "context_width": _side(shapes, "txt_in.weight", 1),
        "hidden": hidden,
        "heads": heads,
        "double_blocks": len(_numbers(shapes, "double_blocks.")),
        "single_blocks": len(_numbers(shapes, "single_blocks.")),
        "mlp_ratio": _ratio(_rows(shapes, "double_blocks.0.img_mlp.0") // family.feed_forward, hidden),
        "guidance_embedding": "guidance_in.in_layer.weight" in shapes,
    }
    if family.rows is FLUX1:
        fields["pooled_width"] = _side(shapes, "vector_in.in_layer.weight", 1)
    return fields


def _ratio(width: int, hidden: int) -> float:
    """The number that times ``hidden``, cut to an integer, is ``width``; 0 without either."""
    if not (width and hidden):
        return 0.0
    ratio = width / hidden
    return ratio if int(hidden * ratio) == width else math.nextafter(ratio, math.inf)


def _differing(row: TransformerSpec, fields: Fields, free: frozenset[str] = frozenset()) -> list[str]:
    """The fields in which a row differs from what was read."""
    return [name for name, value in fields.items() if name not in free and getattr(row, name) != value]


def _chosen(family: _Family, fields: Fields, hints: _Hints) -> TransformerSpec | None:
    """The row of the user's word, None without one; see ``recognise_part`` for what it raises."""
    if hints.variant is None:
        return None
    if hints.variant not in FLUX1 and hints.variant not in FLUX2:
        raise UserError(f"there is no model named {hints.variant}; choose one of {', '.join((*FLUX1, *FLUX2))}")
    row = family.rows.get(hints.variant)
    if row is None:
        title = (FLUX1.get(hints.variant) or FLUX2[hints.variant]).title
        raise MismatchError(
            f"{hints.file} is not {title}: its tensors are those of {family.title}; choose one of "
            f"{', '.join(family.rows)}, or leave the choice to the file"
        )
    told = {name: value for name, value in fields.items() if value or name == "guidance_embedding"}
    differing = _differing(row, told, FREE)
    if differing:
        fitting = [other.name for other in family.rows.values() if not _differing(other, told, FREE)]
        choose = f"choose {' or '.join(fitting)}, or " if fitting else ""
        raise MismatchError(
            f"{hints.file} is not {row.title}: {'; '.join(_difference(row, told, name) for name in differing)}; "
            f"{choose}leave the choice to the file"
        )
    return row


def _difference(row: TransformerSpec, fields: Fields, name: str) -> str:
    if name == "guidance_embedding":
        return "it has a guidance embedding" if fields[name] else "it has no guidance embedding"
    return f"its {LABELS[name]}: {fields[name]}, not {getattr(row, name)}"


def _another_size(
    family: _Family, fields: Fields, chosen: TransformerSpec | None, hints: _Hints
) -> tuple[TransformerSpec, tuple[str, ...]] | str:
    """A spec for sizes that no release has, from the nearest row, with notes; the reason where there is none."""
    absent = [LABELS[name] for name, value in fields.items() if not value and name not in MAY_BE_ZERO]
    if absent:
        return f"tensors are missing that tell its {', '.join(absent)}"
    near = [chosen] if chosen is not None else _nearest(family, fields)
    if not near:
        return f"it takes {fields['in_channels']} input channels"
    base, notes = _choose(near, None, hints)
    try:
        spec = replace(base, name=f"{base.name}-variant", title=f"{base.title} (another size)", **fields)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    if isinstance(spec, Flux1Spec):
        spec = replace(spec, heeds_redux=True)  # for all that is known
    note = (
        f"its sizes are no release's: {spec.double_blocks} double and {spec.single_blocks} single blocks of width "
        f"{spec.hidden}; treated as {base.title}"
    )
    return spec, (note, *notes)


def _nearest(family: _Family, fields: Fields) -> list[TransformerSpec]:
    for common in family.nearest:
        near = [row for row in family.rows.values() if all(getattr(row, name) == fields[name] for name in common)]
        if near:
            return near
    return []


# What shapes cannot tell.

TITLE_KEYS = ("modelspec.title", "general.name")
METADATA_KEYS = (
    "modelspec.title", "modelspec.architecture", "general.name", "general.basename", "general.finetune",
)  # fmt: skip
WORDS = {  # of specs' names, and how people write them in texts of small letters
    "kontext": re.compile("kontext"),
    "krea": re.compile("krea"),
    "depth": re.compile("depth"),
    "canny": re.compile("canny"),
    "kv": re.compile(r"(?:9b|(?<![a-z]))kv(?![a-z])"),
    "base": re.compile(r"(?<!data)base(?!d)"),
}


def _choose(
    fitting: Sequence[TransformerSpec], chosen: TransformerSpec | None, hints: _Hints
) -> tuple[TransformerSpec, tuple[str, ...]]:
    """Of variants that shapes cannot tell apart one, with a note of why; ``fitting`` has at least one."""
    if len(fitting) == 1:
        return fitting[0], ()
    if chosen is not None:
        return chosen, (f"taken for {chosen.title}, as it was chosen; {_others(fitting, chosen)}",)
    titled = [row for row in fitting if row.title in (hints.metadata.get(key) for key in TITLE_KEYS)]
    if titled:
        return titled[0], ()
    for source, text in _texts(hints):
        spec = _by_word(fitting, text)
        if spec is not None:
            return spec, (f"taken for {spec.title} by its {source}; {_others(fitting, spec)}",)
    spec = _by_release(fitting, hints.file_name)
    if spec is not None:
        return spec, (f"taken for {spec.title} by its name; {_others(fitting, spec)}",)
    first = fitting[0]
    return first, (
        f"taken for {first.title}, since neither its metadata nor its name tells; {_others(fitting, first)}",
    )


def _others(fitting: Iterable[TransformerSpec], spec: TransformerSpec) -> str:
    titles = ", ".join(row.title for row in fitting if row is not spec)
    return f"by its tensors it could also be {titles}"


def _texts(hints: _Hints) -> list[tuple[str, str]]:
    """Texts that may tell a variant, what counts most first, with what to call each."""
    told = [(f"metadata ({key})", str(hints.metadata[key]).lower()) for key in METADATA_KEYS if key in hints.metadata]
    return [*told, ("name", hints.file_name.lower())]


def _by_word(fitting: Iterable[TransformerSpec], text: str) -> TransformerSpec | None:
    for word, pattern in WORDS.items():
        if pattern.search(text):
            for spec in fitting:
                if word in spec.name.split("-"):
                    return spec
    return None


def _by_release(fitting: Iterable[TransformerSpec], file_name: str) -> TransformerSpec | None:
    """The row with a release's name, the longest one, that the file's begins with."""
    squeezed = _squeezed(file_name)
    named = [
        (len(stem), spec)
        for spec in fitting
        for release in spec.files
        if squeezed.startswith(stem := _squeezed(release.rsplit(".", 1)[0]))
    ]
    return max(named, key=lambda pair: pair[0])[1] if named else None


def _squeezed(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())


# Autoencoders.


def _autoencoder(shapes: Shapes, hints: _Hints) -> Recognised:
    batch_norm = "bn.running_mean" in shapes
    title = "FLUX.2" if batch_norm else "FLUX.1"
    sides = {side: _levels(shapes, lead) for side, lead in (("encoder", "encoder.down."), ("decoder", "decoder.up."))}
    latent, blocks = _side(shapes, "decoder.conv_in.weight", 1), len(_numbers(shapes, "encoder.down.0.block."))
    for spec in RECOGNISED_AUTOENCODERS.values():
        widths = tuple(spec.base_channels * multiplier for multiplier in spec.channel_multipliers)
        if (
            (spec.latent_channels, spec.batch_norm, spec.res_blocks) == (latent, batch_norm, blocks)
            and all(found == widths for found in sides.values())
        ):  # fmt: skip
            notes = _foreign_scale(hints) if spec.name == SHARED_AUTOENCODER else ()
            return Recognised("autoencoder", PART_TITLES[spec.name], spec, notes, spec.name in AUTOENCODERS)
    found = " and ".join(f"{side} widths {list(levels)}" for side, levels in sides.items())
    return _foreign(
        Foreign(
            role="autoencoder",
            title=f"an autoencoder like {title}'s with {latent} latent channels, {blocks} residual blocks a level, "
            f"{found}, which this version does not run",
            family="flux2" if batch_norm else "",
        )
    )


SHARED_AUTOENCODER = "flux1-ae"
OTHER_SCALES = re.compile(r"sd_?3|stable-?diffusion-?3")  # whose autoencoder has the same tensors


def _foreign_scale(hints: _Hints) -> tuple[str, ...]:
    if OTHER_SCALES.search(hints.file_name.lower()):
        return (
            "by its name it is Stable Diffusion 3's, whose tensors look the same and whose latents mean something else",
        )
    return ()


def _levels(shapes: Shapes, lead: str) -> tuple[int, ...]:
    """Channels of each level, finest first."""
    return tuple(_rows(shapes, f"{lead}{level}.block.0.conv1") for level in sorted(_numbers(shapes, lead)))


# Text encoders.


def _clip(shapes: Shapes, hints: _Hints) -> Recognised:
    tower = "text_model."
    width = _side(shapes, f"{tower}final_layer_norm.weight")
    layers = len(_numbers(shapes, f"{tower}encoder.layers."))
    positions = _side(shapes, f"{tower}embeddings.position_embedding.weight")
    gap = _gap(shapes, [f"{tower}encoder.layers."])
    for spec in CLIP_TEXT.values():
        if not gap and (spec.width, spec.layers) == (width, layers) and positions in (0, spec.positions):
            return Recognised("clip", PART_TITLES[spec.name], spec)
    title = f"a CLIP text encoder of width {width} with {layers} layers and {positions} positions"
    return _unknown_part("clip", title, width, gap)


def _t5(shapes: Shapes, hints: _Hints) -> Recognised:
    width = _side(shapes, "encoder.final_layer_norm.weight")
    layers = len(_numbers(shapes, "encoder.block."))
    words = _side(shapes, "shared.weight") or _side(shapes, "encoder.embed_tokens.weight")
    gap = _gap(shapes, ["encoder.block."])
    for spec in T5_ENCODERS.values():
        if not gap and (spec.width, spec.layers, spec.vocabulary) == (width, layers, words):
            return Recognised("t5", PART_TITLES[spec.name], spec)
    return _unknown_part("t5", f"a T5 encoder of width {width} with {layers} layers and {words} words", width, gap)


def _unknown_part(
    role: str, title: str, width: int, gap: str, otherwise: str = "which FLUX.1 does not use"
) -> Recognised:
    reason = f"which is not whole: {gap} is missing" if gap else otherwise
    return _foreign(Foreign(role=role, title=f"{title}, {reason}", width=width))


# Vision towers, and the adapter behind them.

TOWER = "vision_model."
COLOURS = 3
NAFLEX_SIDES = 2  # of the first layer's weight, which is a matrix there and a convolution's elsewhere
SIGLIP_SIZES = {  # by width and layers
    (768, 12): "base",
    (1024, 24): "large",
    (1152, 27): "so400m",
    (1536, 40): "giant",
}
SECOND_SIGLIP = re.compile(r"siglip[ _-]?v?2")


def _vision(shapes: Shapes, hints: _Hints) -> Recognised:
    width, layers = _side(shapes, f"{TOWER}post_layernorm.weight"), len(_numbers(shapes, f"{TOWER}encoder.layers."))
    patches = shapes.get(f"{TOWER}embeddings.patch_embedding.weight", ())
    places = _side(shapes, f"{TOWER}embeddings.position_embedding.weight")
    told = {
        "mlp_width": _rows(shapes, f"{TOWER}encoder.layers.0.mlp.fc1"),
        "patch": _side(shapes, f"{TOWER}embeddings.patch_embedding.weight", 2),
        "grid": math.isqrt(places),  # rows that fill up a block make no whole row of patches
    }
    gap, is_naflex = _gap(shapes, [f"{TOWER}encoder.layers."]), len(patches) == NAFLEX_SIDES
    for spec in VISION_TOWERS.values():
        differing = [name for name, value in told.items() if value and getattr(spec, name) != value]
        if not (gap or is_naflex or differing) and (spec.width, spec.layers) == (width, layers):
            return Recognised("vision", PART_TITLES[spec.name], spec, _second_siglip(hints))
    size = SIGLIP_SIZES.get((width, layers))
    if size is None or gap:
        title = f"a SigLIP vision tower of width {width} with {layers} layers"
        return _unknown_part("vision", title, width, gap, "which no Redux adapter takes")
    if is_naflex:
        title = f"the SigLIP 2 {size} vision tower (NaFlex, patch {math.isqrt(patches[1] // COLOURS)})"
    else:
        title = f"the SigLIP {size} vision tower (patch {told['patch']}, {told['grid'] * told['patch']} pixels)"
    return _foreign(Foreign(role="vision", title=title, width=width))


def _second_siglip(hints: _Hints) -> tuple[str, ...]:
    """A note where the name tells of SigLIP 2, one of whose towers has the sizes of the one that Redux takes."""
    if SECOND_SIGLIP.search(hints.file_name.lower()):
        return ("by its name it is SigLIP 2's, whose tensors look the same, and with which Redux was not trained",)
    return ()


def _redux(shapes: Shapes, hints: _Hints) -> Recognised:
    vision_width, text_width = _side(shapes, "redux_up.weight", 1), _rows(shapes, "redux_down")
    for spec in REDUXES.values():
        if (spec.vision_width, spec.text_width) == (vision_width, text_width):
            return Recognised("redux", PART_TITLES[spec.name], spec)
    title = f"a Redux adapter from vision tokens of width {vision_width} to text tokens of width {text_width}"
    return _foreign(Foreign(role="redux", title=title, family="flux1", width=text_width))


PARTS: dict[str, Callable[[Shapes, _Hints], Recognised]] = {
    "autoencoder": _autoencoder, "clip": _clip, "t5": _t5, "vision": _vision, "redux": _redux,
}  # fmt: skip
