"""A FLUX.1 [dev] of real size on this machine: opened, inspected, planned, and run, with T5-XXL before it.

``python -m benchmarks.real_size --folder FOLDER --format fp8`` writes the files there (weights are random, so that the
picture is noise; see ``random_files``), and takes the whole chain through them: T5-XXL and CLIP-L encode a prompt of
random words, the transformer takes ``--steps`` steps with its weights packed and unpacked layer by layer, the
autoencoder decodes. 24 GB of disk are needed for fp8 and 19 GB for gguf:Q4_K, and some GB of memory. With a GPU:
``--device cuda --size 1024``.

Memory is sampled from the system while a stage runs. Pages of a mapped file count as this process's while they are
mapped, but the system takes them back when it needs them; what cannot be taken back is the anonymous memory.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.ops.packed import takes_packed
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.describe import describe, summary
from flux.pipelines.parts import BoundPart, Part, bind_part, open_autoencoder, open_clip, open_t5, open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.text_to_image import Request, plan_sigmas
from flux.sampling.noise import draw_noise
from flux.specs.autoencoder import AUTOENCODERS, AutoencoderSpec
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.specs.text import CLIP_L, T5_XXL, ClipTextSpec, T5Spec
from flux.weights.formats.written import GGUF

from .prompts import CELL, TOKEN
from .random_files import FORMATS, write_random

__all__ = ["REAL", "Meter", "Sizes", "main", "run"]

WORDS = 20  # of the prompt
SIDE = 256
SAMPLE_SECONDS = 0.02
KIB = 1024
MB, GB = 1e6, 1e9
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The specs of the parts that are made and run."""

    transformer: Flux1Spec
    t5: T5Spec
    clip: ClipTextSpec
    autoencoder: AutoencoderSpec


REAL = Sizes(
    transformer=FLUX1["flux1-dev"], t5=T5_XXL, clip=CLIP_L, autoencoder=AUTOENCODERS["flux1-ae"]
)  # fmt: skip


@dataclass
class Stage:
    """What one stage took: seconds, and the most bytes that this process had meanwhile."""

    name: str
    seconds: float = 0.0
    anonymous: int = 0
    mapped: int = 0
    whole: int = 0
    device: int = 0


@dataclass
class Meter:
    """Times stages and samples their memory (Linux)."""

    device: torch.device
    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block."""
        stage, over = Stage(name), threading.Event()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        sampler = threading.Thread(target=_sample, args=(stage, over), daemon=True)
        sampler.start()
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                stage.device = torch.cuda.max_memory_allocated(self.device)
        finally:
            stage.seconds = time.perf_counter() - start
            over.set()
            sampler.join()
        self.stages.append(stage)
        sys.stderr.write(f"{name}: {stage.seconds:.2f} s\n")

    def table(self) -> str:
        """All stages as Markdown."""
        on_device = self.device.type != "cpu"
        head = "| | seconds | anonymous memory | mapped file pages | whole |" + (" GPU memory |" if on_device else "")
        rows = [
            f"| {own.name} | {own.seconds:.2f} | {own.anonymous / GB:.2f} GB | {own.mapped / GB:.2f} GB "
            f"| {own.whole / GB:.2f} GB |" + (f" {own.device / GB:.2f} GB |" if on_device else "")
            for own in self.stages
        ]
        return "\n".join((head, "|---" * head.count("|", 1) + "|", *rows))


def _sample(stage: Stage, over: threading.Event) -> None:
    """Keep the largest of what the system says, until it is over."""
    while True:
        last = over.wait(SAMPLE_SECONDS)
        found = memory_now()
        stage.anonymous = max(stage.anonymous, found["RssAnon"])
        stage.mapped = max(stage.mapped, found["RssFile"])
        stage.whole = max(stage.whole, found["VmRSS"])
        if last:
            return


def memory_now() -> dict[str, int]:
    """Bytes of this process by Linux's names: VmRSS, and of it RssAnon and RssFile."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * KIB for row in rows if row[0].startswith(("VmRSS", "RssAnon", "RssFile"))}


@dataclass(frozen=True)
class Files:
    """Where the parts are."""

    transformer: Path
    t5: Path
    clip: Path
    autoencoder: Path


def files_in(folder: Path, sizes: Sizes, kind: str) -> Files:
    """Where the parts are, or will be, with the transformer in ``kind``, a key of ``FORMATS``."""
    suffix = ".gguf" if kind.startswith(GGUF) else ".safetensors"
    return Files(
        transformer=folder / f"{sizes.transformer.name}-random-{kind.removeprefix(GGUF)}{suffix}",
        t5=folder / f"{sizes.t5.name}-random-fp8.safetensors",
        clip=folder / f"{sizes.clip.name}-random.safetensors",
        autoencoder=folder / f"{sizes.autoencoder.name}-random.safetensors",
    )


def write_files(files: Files, sizes: Sizes, kind: str, meter: Meter) -> None:
    """Write what is not there yet, each file a stage of ``meter``."""
    makes = (
        (files.transformer, lambda: Flux1(sizes.transformer), "flux1-bfl", kind, sizes.transformer.title),
        (files.t5, lambda: T5Encoder(sizes.t5), "t5-hf", "fp8", sizes.t5.name),
        (files.clip, lambda: ClipText(sizes.clip), "clip-hf", "bf16", sizes.clip.name),
        (files.autoencoder, lambda: Autoencoder(sizes.autoencoder), "flux1-ae-bfl", "bf16", sizes.autoencoder.name),
    )
    for seed, (path, build, layout, written, title) in enumerate(makes):
        if not path.exists():
            with meter.stage(f"write {path.name}"):
                write_random(path, build, layout, written, title, seed)


@dataclass(frozen=True)
class Plan:
    """Bytes of a transformer.

    Attributes:
        file: On disk.
        resident: In memory while it runs: packed weights, and the numbers of the others; no modulation layers.
        modulations: Numbers of the largest modulation layer, each of which comes once and goes.
        largest: Numbers of the largest packed layer, which are there while it runs.
        unpacked: Numbers of all.
    """

    file: int
    resident: int
    modulations: int
    largest: int
    unpacked: int

    def __str__(self) -> str:
        return (
            f"{self.file / GB:.2f} GB on disk; {self.resident / GB:.2f} GB resident, packed and without modulation "
            f"layers; {self.largest / MB:.0f} MB of numbers of the largest layer while it runs; "
            f"{self.modulations / MB:.0f} MB of the largest modulation layer; {self.unpacked / GB:.2f} GB if all were "
            "unpacked"
        )


def plan(bound: BoundPart, dtype: torch.dtype) -> Plan:
    """What running a transformer packed will take, by its header."""
    apart = tuple(f"{prefix}." for prefix in bound.module.modulation_layers())
    resident, modulations, packed = 0, [0], [0]
    for name, own in bound.bindings.items():
        numbers = own.parameters * dtype.itemsize
        path, _, leaf = name.rpartition(".")
        is_packed = leaf == "weight" and takes_packed(bound.module.get_submodule(path)) and own.nbytes < numbers
        if name.startswith(apart):
            modulations.append(numbers)
            continue
        resident += own.nbytes if is_packed else numbers
        packed.append(numbers if is_packed else 0)
    return Plan(
        file=sum(path.stat().st_size for path in bound.checkpoint.files),
        resident=resident,
        modulations=max(modulations),
        largest=max(packed),
        unpacked=bound.parameters * dtype.itemsize,
    )


@torch.inference_mode()
def encode(t5: Part[T5Spec, T5Encoder], clip: Part[ClipTextSpec, ClipText], length: int) -> EncodedPrompt:
    """A prompt of random words, padded to ``length`` tokens for T5."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, t5.spec.vocabulary, (WORDS,), generator=generator).tolist()
    ids = [*words, t5.spec.eos] + [t5.spec.pad] * (length - WORDS - 1)
    with t5.resident() as encoder:
        tokens = encoder(torch.tensor([ids], device=t5.device)).float().cpu()
    words = torch.randint(2, clip.spec.bos, (WORDS,), generator=generator).tolist()
    ids = [clip.spec.bos, *words, clip.spec.eos] + [clip.spec.pad] * (clip.spec.positions - WORDS - 2)
    with clip.resident() as encoder:
        pooled = encoder(torch.tensor([ids], device=clip.device))[1].float().cpu()
    return EncodedPrompt(tokens, pooled)


@torch.inference_mode()
def decode(part: Part[AutoencoderSpec, Autoencoder], latents: Tensor) -> Tensor:
    """Pixels (1, 3, H, W) of latents."""
    with part.resident() as autoencoder:
        return autoencoder.decode(latents.to(part.device, part.dtype)).float().cpu()


@torch.inference_mode()
def unpack(part: Part[Flux1Spec, Flux1]) -> int:
    """Unpack every packed layer as a step does, and nothing else; returns how many numbers there were."""
    count = 0
    with part.resident(without=tuple(part.module.modulation_layers())) as model:
        for layer in model.modules():
            if takes_packed(layer) and layer.packed is not None:
                count += layer.packed.numbers(part.dtype).numel()
    return count


@dataclass
class Clock:
    """When a run's weights were there, its tables made, its blocks begun and its steps done."""

    blocks: int
    loaded: float = 0.0
    asked: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def hooks(self) -> Hooks:
        return Hooks(progress=self._progress, cancelled=self._cancelled)

    def _progress(self, stage: str, done: int, total: int) -> None:
        if stage == "loading" and done == total:
            self.loaded = time.perf_counter()
        if stage == "sampling":
            self.steps.append(time.perf_counter())

    def _cancelled(self) -> bool:
        if not self.steps:  # the last of these are the first step's blocks
            self.asked.append(time.perf_counter())
        return False

    def __str__(self) -> str:
        first = self.asked[-self.blocks]
        seconds = [later - sooner for sooner, later in zip([first, *self.steps], self.steps, strict=False)]
        return (
            f"modulation tables {first - self.loaded:.2f} s; steps {', '.join(f'{own:.2f} s' for own in seconds)}, "
            f"of {self.blocks} blocks each"
        )


def run(files: Files, device: torch.device, meter: Meter, *, side: int = SIDE, steps: int = 1) -> list[str]:
    """Take the whole chain through the files.

    Args:
        files: The parts.
        device: Where they run.
        meter: Times each stage.
        side: Of the picture, pixels.
        steps: Of the transformer.

    Returns:
        Sentences on what was found.

    Raises:
        AssertionError: A result is not finite.
    """
    with meter.stage("inspect all four files"):
        told = [summary(describe(path)) for path in (files.transformer, files.t5, files.clip, files.autoencoder)]
    with meter.stage("open the transformer"):
        part = open_transformer(files.transformer, device, keep="packed")
    with meter.stage("plan it"):
        planned = plan(bind_part(files.transformer, "transformer"), part.dtype)
    told.append(f"{part.dtype} on {device}: {planned}")
    with meter.stage("open the encoders and the autoencoder"):
        t5, clip = open_t5(files.t5, device, keep="packed"), open_clip(files.clip, device)
        autoencoder = open_autoencoder(files.autoencoder, device)
    spec = part.spec
    with meter.stage(f"encode a prompt, {spec.t5_length} tokens"):
        prompt = encode(t5, clip, spec.t5_length)
    assert prompt.tokens.isfinite().all()
    assert prompt.pooled.isfinite().all()
    cells = side // CELL
    noise = draw_noise((spec.latent_channels, cells, cells), [0])
    sigmas = plan_sigmas(spec, Request(prompt="", steps=steps), (side // TOKEN) ** 2)
    clock = Clock(spec.double_blocks + spec.single_blocks)
    with meter.stage(f"{steps} of {steps} steps at {side}x{side}, loading and tables included"):
        start = time.perf_counter()
        latents = denoise(part, prompt, noise, sigmas, guidance=spec.guidance, hooks=clock.hooks())
    assert latents.isfinite().all()
    with meter.stage("of a step, unpacking alone"):
        count = unpack(part)
    told.append(f"{count / GIGA:.2f} billion numbers are unpacked in a step")
    told.append(f"loading {clock.loaded - start:.2f} s; {clock}; latents of deviation {latents.std():.2f}, all finite")
    with meter.stage("decode"):
        pixels = decode(autoencoder, latents)
    assert pixels.isfinite().all()
    return told


def main(arguments: Sequence[str] | None = None, sizes: Sizes = REAL) -> int:
    """Make the files, run through them, print what was measured, and remove them unless they are to be kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made, or are already")
    parser.add_argument("--format", choices=sorted(FORMATS), default="fp8", help="of the transformer")
    parser.add_argument("--keep", action="store_true", help="keep the files, for another run")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=SIDE, help="of the picture, pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    meter = Meter(device)
    options.folder.mkdir(parents=True, exist_ok=True)
    files = files_in(options.folder, sizes, options.format)
    try:
        write_files(files, sizes, options.format, meter)
        told = run(files, device, meter, side=options.size, steps=options.steps)
    finally:
        if not options.keep:
            for path in vars(files).values():
                path.unlink(missing_ok=True)
    sys.stdout.write(f"{meter.table()}\n\n" + "".join(f"- {sentence}\n" for sentence in told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
