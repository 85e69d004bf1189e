"""The stages that make the embedded model, each resuming from its checkpoint, and the installing of what they made."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..pipelines.parts import open_transformer
from ..specs.autoencoder import MINI as MINI_AUTOENCODER
from ..specs.flux1 import CANNY_MINI, DEPTH_MINI, FILL_MINI, KONTEXT_MINI, MINI, MINI_REDUX, MINI_SCHNELL, Flux1Spec
from ..specs.text import CLIP_MINI, T5_MINI
from ..specs.vision import REDUX_MINI, SIGLIP_MINI
from ..training import parallel
from ..training.checkpoints import load_checkpoint, save_checkpoint
from ..weights.convert import convert
from ..weights.readers.tokenizer import read_clip_tokenizer, read_t5_tokenizer
from .dataset import LatentSet, build_latent_set
from .files import CONTROL_LORAS, FOLDER, REDUX_MINI_FILE, SIGLIP_MINI_FILE
from .language import random_request
from .scenes import draw, lay_out
from .tokenizer import build_tokenizer
from .train_autoencoder import AutoencoderRecipe, pixels_from_bytes, psnr_on_fresh_scenes, train_autoencoder
from .train_flow import FlowRecipe, FrozenEncoders, train_base, train_guided, train_schnell
from .train_guided import Bench, cut_lora, train_control_lora, train_variant, trained_lora_tensors
from .train_style import Listener, Style, train_style, train_words
from .train_text import TextRecipe, train_text_encoders

__all__ = ["FLOW_STAGES", "GUIDED_STAGES", "STAGES", "Builder", "preview_factors"]

FLOW_STAGES = ("latents", "base", "guided", "schnell")
GUIDED_STAGES = ("fill", "canny", "depth", "canny_lora", "depth_lora", "edit", "style")
STAGES = ("tokenizer", "autoencoder", "text", *FLOW_STAGES, *GUIDED_STAGES)

AUTOENCODER = AutoencoderRecipe(joint_steps=1000, decoder_steps=4000)
TEXT = TextRecipe(steps=900)
NATIVE_SCENES, OTHER_SCENES = 60_000, 800
# What ships was trained in sittings: 290,000 samples on scenes with free places, kept as a start; 4,700 steps on scenes
# with fewer places, the last 1,900 lowering the learning rate; from their average 8,600 more, 1,700 of them descending,
# with the times that ``train_flow`` has now; from theirs 1,500, a third of them on nine other canvases, 1,250
# descending; from the shipped weights of then (``--from-shipped``) 3,400 on 24,000 native scenes and 800 of each
# of the 48 other canvases, three quarters of the steps on those, 1,700 descending. Distilled of it: 590 guided and 430
# schnell steps, the last 290 and 130 with half of them native. From nothing, begin with these numbers.
BASE = {"steps": 14_000, "decay": 4000, "batch": 64, "learning_rate": 2e-3}
GUIDED = {"steps": 600, "decay": 500, "batch": 64, "learning_rate": 8e-4}
SCHNELL = {"steps": 400, "decay": 350, "batch": 64, "learning_rate": 8e-4}
# The guided models begin with ``flux1-mini``, Depth with Canny. What ships was trained in sittings, too: Fill's first
# 2,500 steps were without ``PULL``, then 900 with it, 600 of them descending, and from their average 1,600 more, 900
# descending. Depth's LoRA had 500 steps without it and 300 with it. Redux had 3,400 steps of the stage "style", 1,900
# of them descending, then 900 from half the rate to nothing, from the mean of both averages 480 likewise, and from the
# shipped weights of then "style_further", seed 71; all by two processes with half a batch each. From nothing, begin
# with these numbers.
GUIDED_RECIPES: dict[str, dict[str, float]] = {
    "fill": {"steps": 3400, "decay": 1200, "batch": 32, "learning_rate": 1.5e-3},
    "canny": {"steps": 900, "decay": 400, "batch": 32, "learning_rate": 1.5e-3},
    "depth": {"steps": 650, "decay": 250, "batch": 32, "learning_rate": 1.2e-3},
    "canny_lora": {"steps": 500, "decay": 350, "batch": 32, "learning_rate": 8e-4},
    "depth_lora": {"steps": 500, "decay": 350, "batch": 32, "learning_rate": 8e-4},
    "edit": {"steps": 3000, "decay": 1200, "batch": 32, "learning_rate": 1.5e-3},
    "words": {"steps": 800, "decay": 400, "batch": 64, "learning_rate": 2.5e-3},
    "style": {"steps": 4800, "decay": 2400, "batch": 32, "learning_rate": 1.2e-3},
    # With ``--from-shipped``: what guided models learn further.
    "style_further": {"steps": 1800, "decay": 1700, "batch": 32, "learning_rate": 7e-4, "average": 0.998},
}
# As classifier-free guidance of 2: shapes are the sharper for it, colours righter.
PULL = {"fill": 0.5, "depth": 0.5, "depth_lora": 0.5}
GUIDED_SPECS = {"fill": FILL_MINI, "canny": CANNY_MINI, "depth": DEPTH_MINI, "edit": KONTEXT_MINI}
TEXT_PART = "text."  # of what the stage "style" makes: the transformer
STYLE_PARTS = (  # and what runs beside it: prefix, file and title
    ("style.tower.", SIGLIP_MINI_FILE, SIGLIP_MINI.name),
    ("style.redux.", REDUX_MINI_FILE, REDUX_MINI.name),
)
GUIDED_FORMATS = {  # what guided transformers ship in
    FILL_MINI.name: "gguf:Q5_K",
    CANNY_MINI.name: "gguf:Q4_K",
    DEPTH_MINI.name: "gguf:Q4_K",
    KONTEXT_MINI.name: "gguf:Q5_K",  # in Q4_K it changed colours of the rest in 5 of 100 cases
    MINI_REDUX.name: "gguf:Q6_K",  # of the objects in references, one in a hundred fewer was there again in Q5_K
}
SHIPPED_RANK = 18  # of control LoRAs, which are trained with more: outlines and colours were as good in 96 cases

TOKENIZER = "tokenizer.json"
AVERAGE = "average."  # what averaged weights are called in checkpoints
LICENCE = "Apache-2.0"
PREVIEW_SCENES = 64
PREVIEW_KEY = "preview"


class Builder:
    """Runs stages in a folder of checkpoints.

    Args:
        folder: Where checkpoints, latents and finished parts go.
        seed: Of everything drawn.
        device: Where training runs.
        compiled: Whether to compile the transformer's training step.
        report: Told in a line what happens.
        from_shipped: Whether the base and the stage "style" go on from the weights that ship, with their encoders and
            autoencoder, instead of beginning from nothing.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        device: str,
        *,
        compiled: bool,
        report: Callable[[str], None],
        from_shipped: bool = False,
    ) -> None:
        self.folder, self.seed, self.device, self.compiled, self.report = folder, seed, device, compiled, report
        self.from_shipped = from_shipped
        if from_shipped:
            with parallel.in_turn():
                self._take_shipped_parts()

    def run(self, stage: str) -> None:
        """Run one stage, from its checkpoint if there is one.

        Args:
            stage: One of ``STAGES``.

        Raises:
            FileNotFoundError: A stage before it was not run.
            FloatingPointError: Its loss is not finite.
        """
        getattr(self, f"_{stage}")()

    def install(self, target: Path = FOLDER) -> None:
        """Write the finished parts in the layout of real files: bf16, the autoencoder fp16."""
        target.mkdir(parents=True, exist_ok=True)
        preview = preview_factors(self.autoencoder())
        parts: dict[str, tuple[dict[str, Tensor], torch.dtype, dict[str, str]]] = {
            "ae": (self._averaged("ae"), torch.float16, {PREVIEW_KEY: json.dumps(preview)}),
            "t5": (self._plain("t5"), torch.bfloat16, {}),
            "clip": (self._plain("clip"), torch.bfloat16, {}),
            "flux1-mini": (self._averaged("guided"), torch.bfloat16, {"modelspec.title": MINI.title}),
            "flux1-mini-schnell": (self._averaged("schnell"), torch.bfloat16, {"modelspec.title": MINI_SCHNELL.title}),
        }
        for name, (tensors, dtype, extra) in parts.items():
            path = target / f"{name}.safetensors"
            ready = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
            save_file(ready, path, metadata={"format": "pt", "license": LICENCE, **extra})
            path.chmod(0o644)
            self.report(f"installed {path.name}: {path.stat().st_size / 1e6:.2f} MB")
        if self._tokenizer_file().parent != target:
            shutil.copyfile(self._tokenizer_file(), target / TOKENIZER)

    def _tokenizer(self) -> None:
        build_tokenizer(self.folder / TOKENIZER)

    def _autoencoder(self) -> None:
        model = train_autoencoder(self._path("ae"), AUTOENCODER, seed=self.seed, device=self.device, report=self.report)
        self.report(f"autoencoder: {psnr_on_fresh_scenes(model, device=self.device):.2f} dB on fresh scenes")

    def _text(self) -> None:
        if self._path("t5").exists() and self._path("clip").exists():
            return
        t5, clip = train_text_encoders(
            self._path("text"), self._tokenizer_file(), TEXT, seed=self.seed, report=self.report
        )
        save_checkpoint(self._path("t5"), t5.state_dict())
        save_checkpoint(self._path("clip"), clip.state_dict())

    def _latents(self) -> LatentSet:
        return build_latent_set(
            self.folder / "latents",
            self.autoencoder(),
            native=NATIVE_SCENES,
            others=OTHER_SCENES,
            seed=self.seed,
            report=self.report,
        )

    def _base(self) -> None:
        recipe = FlowRecipe(**BASE, compile=self.compiled)  # type: ignore[arg-type]
        train_base(
            self.folder, self._latents(), self.encoders(), recipe,
            seed=self.seed, device=self.device, report=self.report,
            start=_shipped("flux1-mini") if self.from_shipped else None,
        )  # fmt: skip

    def _guided(self) -> None:
        recipe = FlowRecipe(**GUIDED, compile=self.compiled)  # type: ignore[arg-type]
        train_guided(
            self.folder, self.transformer("base"), self._latents(), self.encoders(), recipe,
            seed=self.seed, device=self.device, report=self.report,
        )  # fmt: skip

    def _schnell(self) -> None:
        recipe = FlowRecipe(**SCHNELL, compile=self.compiled)  # type: ignore[arg-type]
        train_schnell(
            self.folder, self.transformer("guided"), self._latents(), self.encoders(), recipe,
            seed=self.seed, device=self.device, report=self.report,
        )  # fmt: skip

    def _fill(self) -> None:
        self._guided_variant("fill")

    def _canny(self) -> None:
        self._guided_variant("canny")

    def _depth(self) -> None:
        self._guided_variant("depth", start=self._averaged(CANNY_MINI.name))

    def _edit(self) -> None:
        self._guided_variant("edit")

    def _canny_lora(self) -> None:
        self._guided_lora(CANNY_MINI)

    def _depth_lora(self) -> None:
        self._guided_lora(DEPTH_MINI)

    def _style(self) -> None:
        teacher, bench = Flux1(MINI), self.bench()
        teacher.load_state_dict(self._text_model())
        if self.from_shipped:
            start, recipe = _shipped_listener(), self._recipe("style_further")
        else:
            saying = train_words(self.folder, bench, self._recipe("words"), seed=self.seed, report=self.report)
            start, recipe = Listener(copy.deepcopy(teacher), saying), self._recipe("style")
        train_style(self.folder, teacher, start, bench, recipe, seed=self.seed, report=self.report)

    def _guided_variant(self, stage: str, start: dict[str, Tensor] | None = None) -> None:
        train_variant(
            self.folder, GUIDED_SPECS[stage], start or self._text_model(), self.bench(), self._recipe(stage),
            seed=self.seed, report=self.report, pull=PULL.get(stage, 0.0),
        )  # fmt: skip

    def _guided_lora(self, spec: Flux1Spec) -> None:
        train_control_lora(
            self.folder, spec.task, self._text_model(), self._averaged(spec.name), self.bench(),
            self._recipe(f"{spec.task}_lora"), seed=self.seed, report=self.report,
            pull=PULL.get(f"{spec.task}_lora", 0.0),
        )  # fmt: skip

    def _text_model(self) -> dict[str, Tensor]:
        """What guided models begin with: the folder's own ``flux1-mini``, else the shipped one."""
        return self._averaged("guided") if self._path("guided").exists() else _shipped("flux1-mini")

    def _listener(self, prefix: str) -> dict[str, Tensor]:
        """A part of what the stage "style" made."""
        whole = self._averaged("style")
        return {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}

    def _recipe(self, stage: str) -> FlowRecipe:
        """Of a guided stage; processes that train together share its batch."""
        recipe = FlowRecipe(**GUIDED_RECIPES[stage])  # type: ignore[arg-type]
        return replace(recipe, batch=max(1, recipe.batch // parallel.size()))

    def bench(self) -> Bench:
        """What the guided stages work with: the shipped encoders, or the folder's own."""
        with parallel.in_turn():
            self._take_shipped_parts()
        return Bench(self.autoencoder(), self.encoders(), self.device)

    def install_guided(self, target: Path = FOLDER) -> None:
        """Write those guided parts that are finished: transformers in ``GUIDED_FORMATS``, the others in bf16."""
        target.mkdir(parents=True, exist_ok=True)
        written = []
        for stage, spec in GUIDED_SPECS.items():
            if self._path(spec.name).exists():
                written.append(self._install_quantized(spec, self._averaged(spec.name), target))
            lora = self._path(f"{stage}-lora")
            if lora.exists():
                written.append(target / CONTROL_LORAS[stage].name)
                tensors = cut_lora(trained_lora_tensors(self._averaged(f"{stage}-lora")), SHIPPED_RANK)
                _write(written[-1], tensors, torch.bfloat16, f"{spec.title} LoRA")
        if self._path("style").exists():
            written.append(self._install_quantized(MINI_REDUX, self._listener(TEXT_PART), target))
            for prefix, path, title in STYLE_PARTS:
                written.append(target / path.name)
                _write(written[-1], self._listener(prefix), torch.bfloat16, title)
        for path in written:
            self.report(f"installed {path.name}: {path.stat().st_size / 1e6:.2f} MB")

    def _install_quantized(self, spec: Flux1Spec, tensors: dict[str, Tensor], target: Path) -> Path:
        whole = self.folder / f"{spec.name}-whole.safetensors"
        _write(whole, tensors, torch.float32, spec.title)
        made = convert(whole, target / spec.files[0], GUIDED_FORMATS[spec.name], replace=True).path
        whole.unlink()
        return made

    def autoencoder(self) -> Autoencoder:
        """The autoencoder as far as it is trained."""
        model = Autoencoder(MINI_AUTOENCODER)
        model.load_state_dict(self._averaged("ae"))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        return model.eval()

    def encoders(self) -> FrozenEncoders:
        """The trained text encoders with the tokenizer."""
        t5, clip = T5Encoder(T5_MINI), ClipText(CLIP_MINI)
        t5.load_state_dict(self._plain("t5"))
        clip.load_state_dict(self._plain("clip"))
        tokenizer = self._tokenizer_file()
        return FrozenEncoders(
            t5.eval().to(self.device),
            clip.eval().to(self.device),
            read_t5_tokenizer(tokenizer, T5_MINI),
            read_clip_tokenizer(tokenizer, CLIP_MINI),
        )

    def transformer(self, stage: str) -> Flux1:
        """A stage's transformer with its averaged weights."""
        model = Flux1(MINI_SCHNELL if stage == "schnell" else MINI)
        model.load_state_dict(self._averaged(stage))
        return model.eval().to(self.device)

    def _take_shipped_parts(self) -> None:
        """Put the shipped autoencoder and text encoders where their stages would, if those were not run."""
        for name, prefix in (("ae", AVERAGE), ("t5", ""), ("clip", "")):
            if not self._path(name).exists():
                save_checkpoint(self._path(name), {f"{prefix}{key}": value for key, value in _shipped(name).items()})

    def _tokenizer_file(self) -> Path:
        """The folder's tokenizer, or, where that stage was not run there, the shipped one."""
        own = self.folder / TOKENIZER
        return own if own.exists() else FOLDER / TOKENIZER

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _averaged(self, name: str) -> dict[str, Tensor]:
        return {k[len(AVERAGE) :]: v for k, v in self._plain(name).items() if k.startswith(AVERAGE)}

    def _plain(self, name: str) -> dict[str, Tensor]:
        return load_checkpoint(self._path(name))[0]


def _write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, title: str) -> None:
    ready = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    save_file(ready, path, metadata={"format": "pt", "license": LICENCE, "modelspec.title": title})
    path.chmod(0o644)


def _shipped(name: str) -> dict[str, Tensor]:
    """A shipped file's tensors in single precision."""
    return {key: tensor.float() for key, tensor in load_file(FOLDER / f"{name}.safetensors").items()}


def _shipped_listener() -> Listener:
    """What ships of the stage "style", in single precision."""
    text, style = Flux1(MINI), Style()
    shipped = open_transformer(FOLDER / MINI_REDUX.files[0], torch.device("cpu"), torch.float32, keep="numbers")
    with shipped.resident() as flux:
        text.load_state_dict(flux.state_dict())
    style.tower.load_state_dict(_shipped(SIGLIP_MINI_FILE.stem))
    style.redux.load_state_dict(_shipped(REDUX_MINI_FILE.stem))
    return Listener(text, style)


@torch.inference_mode()
def preview_factors(autoencoder: Autoencoder) -> dict[str, list[list[float]] | list[float]]:
    """The linear map from a latent cell to its mean colour, fitted on scenes.

    Returns:
        ``factors`` (C rows of red, green, blue) and ``bias`` (red, green, blue), for latents in the transformer's
        space and colours in -1..1, as ComfyUI's latent previews take them.
    """
    rng = random.Random("preview")
    pictures = [pixels_from_bytes(draw(lay_out(random_request(rng), rng))) for _ in range(PREVIEW_SCENES)]
    pixels = torch.stack(pictures)
    latents = autoencoder.encode(pixels).permute(0, 2, 3, 1).flatten(0, 2)
    colours = torch.nn.functional.avg_pool2d(pixels, autoencoder.spec.downscale).permute(0, 2, 3, 1).flatten(0, 2)
    ones = torch.ones(len(latents), 1)
    solution = torch.linalg.lstsq(torch.cat((latents, ones), dim=1), colours).solution
    return {"factors": solution[:-1].tolist(), "bias": solution[-1].tolist()}
