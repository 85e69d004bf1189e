"""The embedded model as it ships: it draws what prompts say, and diffusers draws the same pictures from its files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.prompts import measure
from flux.mini.files import (
    FOLDER,
    GUIDED_FILES,
    MINI,
    MINI_SCHNELL,
    open_mini,
)
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.pipelines.text_to_image import Request, generate
from flux.weights.readers.gguf import GgufFile
from tests.oracles import autoencoder_oracle, clip_oracle, flux1_oracle, t5_oracle

MOST_BYTES = 32_000_000  # of the models that draw from text, and again of those that pictures guide
PROMPT = "a large red circle on the left and a large blue square on the right"
SEED = 7
LEVELS = 2  # of 255, by which a few pixels may differ: two implementations round in different places
DRAWN = 48  # held-out prompts
ALL_RIGHT = {"mini": 0.9, "mini-schnell": 0.85}  # against broken weights; benchmarks/tables/prompts.md is the measure
WITH_SHIFT = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


def as_stored(module, path):
    """The file's numbers by safetensors' own reader, under the file's own names; none of the engine's loading."""
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("files", [MINI, MINI_SCHNELL], ids=["mini", "mini-schnell"])
def test_the_same_seed_gives_the_same_picture_in_diffusers(files):
    model = open_mini(files)
    spec = model.transformer.spec
    theirs_t5 = t5_oracle(as_stored(T5Encoder(model.text.t5.spec), model.text.t5.path))
    theirs_clip = clip_oracle(as_stored(ClipText(model.text.clip.spec), model.text.clip.path))
    # diffusers' own single-file loader takes every FLUX for 3072 wide, so the file's names are mapped here.
    transformer = flux1_oracle(as_stored(Flux1(spec), model.transformer.path))
    vae = autoencoder_oracle(as_stored(Autoencoder(model.autoencoder.spec), model.autoencoder.path))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**(WITH_SHIFT if spec.shifted_schedule else {})),
        vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        t5_ids = torch.tensor([model.text.t5_tokenizer(PROMPT).ids])
        clip_ids = torch.tensor([model.text.clip_tokenizer(PROMPT).ids])
        theirs = pipeline(
            prompt_embeds=theirs_t5(t5_ids).last_hidden_state,
            pooled_prompt_embeds=theirs_clip(clip_ids).pooler_output,
            width=128, height=128, num_inference_steps=spec.steps, guidance_scale=spec.guidance or 0.0,
            generator=torch.Generator().manual_seed(SEED), output_type="np",
        ).images[0]  # fmt: skip
    [picture] = generate(model, Request(prompt=PROMPT, seed=SEED))
    difference = np.abs(picture.pixels.numpy().astype(float) - 255 * theirs)
    assert difference.max() <= LEVELS
    assert theirs.std() > 0.1  # a picture, not a plane


@pytest.mark.parametrize("name", ["mini", "mini-schnell"])
def test_it_draws_what_prompts_say_that_training_never_drew(name):
    rates = measure(name, DRAWN).tally.rates()
    assert rates["all asked"] == DRAWN
    assert rates["all"] >= ALL_RIGHT[name], rates


def test_the_files_are_small_and_state_their_licence():
    guided = [path for path in FOLDER.iterdir() if path in GUIDED_FILES]
    assert len(guided) == len(GUIDED_FILES)
    for group in (guided, [path for path in FOLDER.iterdir() if path not in GUIDED_FILES]):
        assert sum(path.stat().st_size for path in group) <= MOST_BYTES
    for path in FOLDER.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["license"] == "Apache-2.0"
    for path in FOLDER.glob("*.gguf"):
        assert GgufFile(path).metadata["general.license"] == "Apache-2.0"
