"""Latents of many scenes, encoded once, with the requests that they answer.

A scene is a function of the data set's seed and its number, so only latents are stored; requests are drawn again.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder
from ..training.checkpoints import load_checkpoint, save_checkpoint
from . import language, scenes
from .labels import token_labels
from .language import Request, random_request
from .scenes import draw, lay_out
from .train_autoencoder import pixels_from_bytes

__all__ = ["CANVASES", "LatentSet", "build_latent_set", "request_of"]

NATIVE = (128, 128)
SIDES = range(96, 193, 16)
# Every canvas that divides into tokens. A word begins at another column on every width, and what a network has not seen
# there it does not write.
CANVASES = (NATIVE, *(canvas for canvas in itertools.product(SIDES, SIDES) if canvas != NATIVE))
ENCODE_BATCH = 32


@dataclass(frozen=True)
class LatentSet:
    """Scenes by canvas size.

    Attributes:
        latents: Scaled latents (N, C, h, w) in half precision.
        requests: What each scene answers.
        labels: What lies at each of its tokens (N, tokens, questions); see ``labels``.
    """

    latents: dict[tuple[int, int], Tensor]
    requests: dict[tuple[int, int], list[Request]]
    labels: dict[tuple[int, int], Tensor]


def request_of(seed: int, canvas: tuple[int, int], index: int) -> tuple[Request, random.Random]:
    """The request of one scene, and the random state that lays it out."""
    rng = random.Random(f"scene/{seed}/{canvas}/{index}")
    return random_request(rng), rng


def build_latent_set(
    folder: Path,
    autoencoder: Autoencoder,
    *,
    native: int,
    others: int,
    seed: int = 0,
    report: Callable[[str], None],
) -> LatentSet:
    """Encode ``native`` scenes of 128x128 and ``others`` of each further size.

    A size whose file in ``folder`` holds these very scenes, encoded by this very autoencoder, is taken as it is; any
    other is made anew, and it is said.
    """
    origin = origin_of(autoencoder, seed)
    latents, requests, labels = {}, {}, {}
    for canvas in CANVASES:
        count = native if canvas == NATIVE else others
        path = folder / f"latents-{canvas[0]}x{canvas[1]}.safetensors"
        kept = _kept(path, origin | {"count": count}, report)
        if kept is None:
            kept = _encode_scenes(autoencoder, canvas, count, seed)
            save_checkpoint(path, {"latents": kept}, origin | {"count": count})
        latents[canvas] = kept
        drawn = [request_of(seed, canvas, i) for i in range(len(latents[canvas]))]
        requests[canvas] = [request for request, _ in drawn]
        answers = [token_labels(lay_out(request, rng, *canvas)) for request, rng in drawn]
        labels[canvas] = torch.from_numpy(np.stack(answers))
        report(f"latents: {len(latents[canvas])} scenes of {canvas[0]}x{canvas[1]}")
    return LatentSet(latents, requests, labels)


def origin_of(autoencoder: Autoencoder, seed: int) -> dict[str, object]:
    """What latents depend on: the seed, the code that draws scenes, and the encoder's weights, as digests."""
    weights = hashlib.sha256()
    for name, tensor in sorted(autoencoder.encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    code = hashlib.sha256(b"".join(Path(inspect.getfile(m)).read_bytes() for m in (language, scenes)))
    return {"seed": seed, "scene code": code.hexdigest(), "encoder": weights.hexdigest()}


def _kept(path: Path, origin: dict[str, object], report: Callable[[str], None]) -> Tensor | None:
    """The latents of a file if they are of this origin."""
    if not path.exists():
        return None
    tensors, found = load_checkpoint(path)
    changed = [key for key, value in origin.items() if found.get(key) != value]
    if changed:
        report(f"latents: {path.name} is of another {' and '.join(changed)}; it is made again")
        return None
    return tensors["latents"]


@torch.inference_mode()
def _encode_scenes(autoencoder: Autoencoder, canvas: tuple[int, int], count: int, seed: int) -> Tensor:
    batches = []
    for start in range(0, count, ENCODE_BATCH):
        pictures = []
        for index in range(start, min(count, start + ENCODE_BATCH)):
            request, rng = request_of(seed, canvas, index)
            pictures.append(pixels_from_bytes(draw(lay_out(request, rng, *canvas))))
        pixels = torch.stack(pictures).contiguous(memory_format=torch.channels_last)
        batches.append(autoencoder.encode(pixels).half())
    return torch.cat(batches)
