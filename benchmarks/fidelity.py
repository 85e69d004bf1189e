"""What each storage format costs in fidelity, on the embedded model: ``python -m benchmarks fidelity``.

``flux1-mini`` is converted to every format that can be written, and opened as users open it, packed formats packed. All
run in fp32, so that what differs from the fp32 file comes of the storage alone:

- bytes per weight: of the matrices that are stored packed, companions included, and of the whole file;
- weights: the Frobenius norm of these matrices' error, relative to their own;
- one forward: the same of the velocity at sigma 0.5, half way between one noise and one finished picture;
- pictures: PSNR against those of the fp32 file at the same prompts and seeds and the model's own steps, of the median
  picture and of the worst. Where a sampler's path forks, a picture may differ much that is as good.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux.mini.files import MINI, open_mini
from flux.pipelines.denoising import denoise, prepared
from flux.pipelines.parts import bind_part, open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.text_to_image import FluxModel, Request, decode, plan_sigmas
from flux.sampling.noise import draw_noise
from flux.weights.convert import convert
from flux.weights.formats.written import GGUF, WRITTEN
from flux.weights.storing import packs

from .prompts import CELL, NATIVE, TOKEN, requests_for_measuring
from .report import Report

__all__ = ["Fidelity", "Runs", "measure", "table"]

REFERENCE = "fp32"
COUNT = 8  # pictures
SEED = 4_004
MIDDLE = 0.5  # the sigma of the one forward
LARGEST = 255  # of a byte
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fidelity:
    """One format beside fp32; errors are relative, PSNR in dB."""

    name: str
    packed_bytes: float
    file_bytes: float
    weights: float
    velocity: float
    psnr: float
    worst_psnr: float


@dataclass(frozen=True)
class Runs:
    """What a transformer file gives.

    Attributes:
        packed_bytes: For each weight of the packed matrices.
        file_bytes: For each weight of all.
        weights: The packed matrices in fp32, by name.
        latents: Finished ones (B, C, h, w).
        velocity: Of the one forward (1, C, h, w).
        pictures: (B, H, W, 3) as bytes.
    """

    packed_bytes: float
    file_bytes: float
    weights: dict[str, Tensor]
    latents: Tensor
    velocity: Tensor
    pictures: Tensor


def run(model: FluxModel, path: Path, keep: str, prompts: EncodedPrompt, start: Tensor | None = None) -> Runs:
    """Everything that is compared.

    Args:
        model: For its autoencoder.
        path: The transformer.
        keep: See ``open_transformer``.
        prompts: One for each picture (B, ...).
        start: Finished latents (1, C, h, w) that the one forward looks at; its own first picture's when None.
    """
    bound = bind_part(path, "transformer")
    weights = {name: own for name, own in bound.bindings.items() if packs("transformer", name)}
    part = open_transformer(path, CPU, torch.float32, keep=keep)
    width, height = NATIVE
    shape = (part.spec.latent_channels, height // CELL, width // CELL)
    noise = draw_noise(shape, [SEED + place for place in range(len(prompts.tokens))])
    sigmas = plan_sigmas(part.spec, Request(prompt=""), (width // TOKEN) * (height // TOKEN))
    latents = denoise(part, prompts, noise, sigmas, guidance=part.spec.guidance)
    first = EncodedPrompt(prompts.tokens[:1], prompts.pooled[:1])
    with prepared(part, first, (MIDDLE, 0.0), guidance=part.spec.guidance) as velocity, torch.inference_mode():
        clean = latents[:1] if start is None else start
        found = velocity(MIDDLE * noise[:1] + (1 - MIDDLE) * clean, MIDDLE)
    count = sum(own.parameters for own in weights.values())
    return Runs(
        packed_bytes=sum(own.nbytes for own in weights.values()) / count,
        file_bytes=path.stat().st_size / bound.parameters,
        weights={name: own.numbers(torch.float32) for name, own in weights.items()},
        latents=latents,
        velocity=found,
        pictures=decode(model.autoencoder, latents),
    )


def compare(name: str, ours: Runs, reference: Runs) -> Fidelity:
    """A format's runs beside the reference's."""
    each = [psnr(*pair) for pair in zip(ours.pictures, reference.pictures, strict=True)]
    return Fidelity(
        name=name,
        packed_bytes=ours.packed_bytes,
        file_bytes=ours.file_bytes,
        weights=relative_error(list(ours.weights.values()), list(reference.weights.values())),
        velocity=relative_error([ours.velocity], [reference.velocity]),
        psnr=statistics.median(each),
        worst_psnr=min(each),
    )


def relative_error(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The norm of the difference of several tensors, taken as one, relative to the reference's norm."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, reference, strict=True))
    return math.sqrt(error / sum(float(b.double().square().sum()) for b in reference))


def psnr(ours: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of bytes in dB; infinite for equal ones."""
    error = float((ours.double() - reference.double()).square().mean())
    return 10 * math.log10(LARGEST**2 / error) if error else math.inf


def measure(names: Sequence[str] = tuple(WRITTEN), count: int = COUNT, path: Path = MINI.transformer) -> list[Fidelity]:
    """Every format of ``names`` against fp32, on a model that takes the embedded encoders and autoencoder.

    Args:
        names: Keys of ``WRITTEN``.
        count: Pictures, each of a prompt of its own that training never drew.
        path: The transformer.
    """
    model = open_mini(MINI, dtype=torch.float32)
    texts = [(text, None) for _, text in requests_for_measuring(count, SEED)]
    encoded = model.text.encode_all(texts, length=model.transformer.spec.t5_length)
    prompts = EncodedPrompt(torch.cat([e.tokens for e in encoded]), torch.cat([e.pooled for e in encoded]))
    with tempfile.TemporaryDirectory() as folder:
        reference = run(model, stored_as(REFERENCE, path, Path(folder)), "numbers", prompts)
        found = []
        for name in names:
            keep = "packed" if WRITTEN[name].packs else "numbers"
            ours = run(model, stored_as(name, path, Path(folder)), keep, prompts, reference.latents[:1])
            found.append(compare(name, ours, reference))
    return found


def stored_as(name: str, path: Path, folder: Path) -> Path:
    """The transformer at ``path`` in a format, in a new file."""
    suffix = ".gguf" if name.startswith(GGUF) else ".safetensors"
    target = folder / f"{path.stem}-{name.replace(':', '-')}{suffix}"
    convert(path, target, name, replace=True)
    return target


def table(names: Sequence[str] = tuple(WRITTEN), count: int = COUNT) -> Report:
    """The comparison."""
    found = measure(names, count)
    rows = [
        f"| {own.name} | {WRITTEN[own.name].title} | {own.packed_bytes:.2f} | {own.file_bytes:.2f} "
        f"| {_share(own.weights)} | {_share(own.velocity)} | {_decibel(own.psnr)} | {_decibel(own.worst_psnr)} |"
        for own in found
    ]
    text = "\n".join(
        (
            "`flux1-mini` (its own file is bf16, which is exact therefore) in every format of `convert`, run in fp32 "
            f"on the CPU, packed weights packed. {count} pictures of 128x128 against those of the fp32 file at equal "
            "seeds. Bytes are those of each weight: of the matrices that are packed, and of the whole file.",
            "",
            "| `--to` | | bytes, packed | bytes, file | error of weights | of one forward | PSNR, median | worst |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        )
    )
    data = [{**asdict(own), "title": WRITTEN[own.name].title} for own in found]
    return Report(text, {"pictures": count, "rows": data})


def _share(error: float) -> str:
    """A relative error in percent, with two digits that count."""
    return f"{100 * error:.2g} %" if error else "0"


def _decibel(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
