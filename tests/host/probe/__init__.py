"""Nodes that the host tests put beside the pack: they look inside a run, or do what a user's mistake would do."""

from __future__ import annotations

import importlib
import json
import sys
import time

import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.text_encoders.flux
import torch
from comfy_api.latest import ComfyExtension, io

KEY = "fluxfoundry"  # of the pack's sampling wrapper


class ProbeConditioning(io.ComfyNode):
    """Text conditioning of any width, as another model family's encoders would give."""

    @classmethod
    def define_schema(cls):
        sides = [io.Int.Input(name, default=8) for name in ("width", "pooled", "length")]
        return io.Schema("ProbeConditioning", category="probe", inputs=sides, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, width, pooled, length):
        return io.NodeOutput([[torch.zeros(1, length, width), {"pooled_output": torch.zeros(1, pooled)}]])


class ProbeCompare(io.ComfyNode):
    """Reports how far two latents lie apart, everywhere and where a mask keeps."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("a"), io.Latent.Input("b"), io.Mask.Input("mask", optional=True)]
        return io.Schema("ProbeCompare", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, a, b, mask=None):
        a, b = a["samples"], b["samples"]
        difference = (a - b).abs()
        report = {"largest": float(difference.max()), "equal": torch.equal(a, b), "spread": float(a.std())}
        if mask is not None:
            kept = comfy.sampler_helpers.prepare_mask(mask, a.shape, a.device) == 0
            report |= {"kept": int(kept.sum()), "kept_largest": float(difference[kept].max())}
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbePick(io.ComfyNode):
    """One picture of a batch, as a batch of its own."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("latent"), io.Int.Input("index", default=0)]
        return io.Schema("ProbePick", category="probe", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, latent, index):
        return io.NodeOutput({"samples": latent["samples"][index : index + 1]})


class ProbeForeignLatent(io.ComfyNode):
    """A latent of another model: of FLUX.1's autoencoder, or, with other channels, of another family."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("channels", default=16)]
        return io.Schema("ProbeForeignLatent", category="probe", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, channels):
        latent = {"samples": torch.ones(1, channels, 16, 16)}
        return io.NodeOutput(latent | ({"fluxfoundry_autoencoder": "flux1-ae"} if channels == 16 else {}))


class ProbeTokens(io.ComfyNode):
    """A text's tokens by the pack's tokenizers of real encoders, and by the host's own."""

    @classmethod
    def define_schema(cls):
        inputs = [io.String.Input("text")]
        return io.Schema("ProbeTokens", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, text):
        [pack] = [name for name in sys.modules if name.replace("\\", "/").endswith("/custom_nodes/fluxfoundry")]
        bridge, specs = (importlib.import_module(f"{pack}.{name}") for name in ("nodes.bridge.clip", "flux.specs.text"))
        ours = bridge.real_or_embedded_tokenizers(specs.CLIP_L, specs.T5_XXL, 256).tokenize_with_weights(text)
        # With the keyword that FLUX Text Encode gives to any CLIP, the core's included.
        theirs = comfy.text_encoders.flux.FluxTokenizer().tokenize_with_weights(text, cut_told_of=("l",))
        return io.NodeOutput(ui={"report": [json.dumps({"ours": ours, "theirs": theirs})]})


def zero_control(model):
    _with_control(model, 0.0)


def control(model):
    _with_control(model, 0.3)


def _with_control(model, strength):
    """Residuals as a ControlNet gives them, in its own number format, on a part of the image tokens."""
    generator = torch.Generator().manual_seed(5)
    residuals = [(strength * torch.randn(1, 40, 256, generator=generator)).half() for _ in range(3)]

    def controlled(apply, args):
        given = {"input": residuals[:1], "output": [None, *residuals[1:]]}
        return apply(args["input"], args["timestep"], **{**args["c"], "control": given})

    model.set_model_unet_function_wrapper(controlled)


def attention_patches(model):
    def louder(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"q": q * 1.5, "v": v * (1.0 + 0.1 * extra_options["block_index"])}

    def quieter(attention, extra_options):
        start, end = extra_options["img_slice"]
        return torch.cat((attention[:, :start], 0.8 * attention[:, start:end]), dim=1)

    model.set_model_attn1_patch(louder)
    model.set_model_attn1_output_patch(quieter)


def other_attention(model):
    def halved(attention, *args, **kwargs):
        return 0.5 * attention(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = halved


def input_patch(model):
    """More text and more image tokens, as style and reference nodes add them."""

    def longer(args):
        twice = {"txt": ["txt", "txt_ids"], "img": ["img", "img_ids"]}
        return {**args, **{k: torch.cat((args[k], args[k][:, :3]), dim=1) for names in twice.values() for k in names}}

    model.set_model_post_input_patch(longer)


def rope_options(model):
    model.set_model_rope_options(scale_x=0.5, shift_x=1.0, scale_y=2.0, shift_y=0.0, scale_t=1.0, shift_t=3.0)


PATCHES = {
    change.__name__.replace("_", " "): change
    for change in (zero_control, control, attention_patches, other_attention, input_patch, rope_options)
}


def slow_plain(model, seconds):
    """Blocks that take their time without a patch on them, so that the plain path is run."""

    def slowed(apply, args):
        hooks = [
            block.register_forward_pre_hook(lambda *_: time.sleep(seconds))
            for block in model.model.diffusion_model.single_blocks
        ]
        try:
            return apply(args["input"], args["timestep"], **args["c"])
        finally:
            for hook in hooks:
                hook.remove()

    model.set_model_unet_function_wrapper(slowed)


TABULATED = []


def watch_table(model):
    """Notes after each call how many moments the run's modulation table holds."""

    def watched(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        table = args["c"]["transformer_options"].get("fluxfoundry_modulations")
        TABULATED.append(None if table is None else sum(len(row) for row in table._rows.values()))
        return out

    model.set_model_unet_function_wrapper(watched)


class ProbeTable(io.ComfyNode):
    """Reports what the run that made a latent had in its modulation table."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("latent")]
        return io.Schema("ProbeTable", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, latent):
        moments = list(TABULATED)
        TABULATED.clear()
        return io.NodeOutput(ui={"report": [json.dumps({"moments": moments})]})


class ProbeModel(io.ComfyNode):
    """A MODEL with something done to it."""

    @classmethod
    def define_schema(cls):
        options = ["direct", "identity blocks", "slow blocks", "slow plain", "nan", "watch table", *PATCHES]
        what, seconds = io.Combo.Input("what", options=options), io.Float.Input("seconds", default=0.0, optional=True)
        inputs = [io.Model.Input("model"), what, seconds]
        return io.Schema("ProbeModel", category="probe", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model, what, seconds=0.0):
        model = model.clone()
        if what in PATCHES:
            PATCHES[what](model)
        if what == "slow plain":
            slow_plain(model, seconds)
        if what == "watch table":
            watch_table(model)
        if what == "direct":
            model.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, KEY)
        if what == "identity blocks":
            for kind in ("double_block", "single_block"):
                model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", kind, 0)
        if what == "slow blocks":

            def slowly(args, extra):
                time.sleep(seconds)
                return extra["original_block"](args)

            for index in range(len(model.model.diffusion_model.single_blocks)):
                model.set_model_patch_replace(slowly, "dit", "single_block", index)
        if what == "nan":
            model.set_model_unet_function_wrapper(lambda apply, args: torch.full_like(args["input"], torch.nan))
        return io.NodeOutput(model)


class Probes(ComfyExtension):
    async def get_node_list(self):
        return [ProbeConditioning, ProbeCompare, ProbePick, ProbeModel, ProbeForeignLatent, ProbeTokens, ProbeTable]


async def comfy_entrypoint():
    return Probes()
