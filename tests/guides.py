"""Small guides of every kind, and what the tests of guided generation draw with them."""

from __future__ import annotations

import torch
from torch import nn

from flux.adapters.control_lora import ControlLora, LowRank
from flux.adapters.guides import Channels, Reference, StyleTokens
from flux.models.flux1 import Flux1
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.sampling.schedules import flux_schedule
from tests.oracles import rows
from tests.tiny import TINY

CELLS = (4, 6)
STEPS, MU, GUIDANCE = 4, 0.6, 3.0
SIGMAS = flux_schedule(STEPS, MU)
CLOSE = 1e-6  # of relative_error: what is the same but for the order of sums
MATTERS = 1e-3  # what a guide changes is more than this
PROMPT = EncodedPrompt(rows(1, 9, TINY.context_width, seed=2), rows(1, TINY.pooled_width, seed=3))
NEGATIVE = EncodedPrompt(rows(1, 7, TINY.context_width, seed=4), rows(1, TINY.pooled_width, seed=5))


def make_lora(seed, spec=TINY, rank=4):
    """A control LoRA with a branch for every layer and a scale for every norm, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    model = Flux1(spec)
    layers = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            inputs = 128 if path == "img_in" else layer.in_features
            down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.3
            layers[path] = LowRank(down, up, 0.1 * torch.randn(layer.out_features, generator=generator))
    norms = {
        name: 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if name.endswith("_norm.scale")
    }
    return ControlLora(f"lora {seed}", layers, norms, 64)


LORAS = [make_lora(71), make_lora(72)]


def noise(batch=1):
    return draw_noise((TINY.latent_channels, *CELLS), [31 + index for index in range(batch)])


# Every kind of guide, on a Fill model with a control model beside it.


def fill(batch=1, **how):
    return Channels(latents=rows(batch, 80, *CELLS, seed=11), **how)


def control(batch=1, **how):
    return Channels(latents=rows(batch, 16, *CELLS, seed=12), model="canny", **how)


def lora(which=0, batch=1, **how):
    return Channels(latents=rows(batch, 16, *CELLS, seed=13 + which), lora=LORAS[which], **how)


def style(seed=15, batch=1, **how):
    return StyleTokens(tokens=rows(batch, 5, TINY.context_width, seed=seed), **how)


def reference(seed=16, batch=1, **how):
    return Reference(latents=rows(batch, 16, 2, 4, seed=seed), **how)


KINDS = {"fill": fill, "control": control, "lora": lora, "style": style, "reference": reference}
PREDICTED = ("fill", "control")  # kinds that are blended of predictions, rather than taking part in one
