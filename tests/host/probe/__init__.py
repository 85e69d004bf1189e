"""Nodes that the host tests put beside the pack: they look inside a run, or do what a user's mistake would do."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.text_encoders.flux
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from . import memory

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


class ProbeGraphs(io.ComfyNode):
    """Reports how many graphs torch has compiled by the time that latents are there."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("a"), io.Latent.Input("b", optional=True)]
        return io.Schema("ProbeGraphs", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, a, b=None):
        report = {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
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
        inputs = [io.Int.Input("channels", default=16), io.Float.Input("value", default=1.0, optional=True)]
        return io.Schema("ProbeForeignLatent", category="probe", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, channels, value=1.0):
        latent = {"samples": torch.full((1, channels, 16, 16), value)}
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


def cut_file(model):
    """Have another process cut the model's file in the middle of the first step."""
    cutters, command = [], "import os, sys; os.truncate(sys.argv[1], 1000)"

    def cutting(apply, args):
        if not cutters:
            cutters.append(subprocess.Popen([sys.executable, "-c", command, str(model.model.given.path)]))
            time.sleep(0.5)
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(cutting)


def lose_device(apply, args):
    """As a driver that failed."""
    raise RuntimeError("CUDA error: unspecified launch failure")


class ProbeModel(io.ComfyNode):
    """A MODEL with something done to it."""

    @classmethod
    def define_schema(cls):
        options = [
            "direct",
            "identity blocks",
            "slow blocks",
            "slow plain",
            "nan",
            "lost",
            "cut",
            "watch table",
            *PATCHES,
        ]
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
        if what == "cut":
            cut_file(model)
        if what == "lost":
            model.set_model_unet_function_wrapper(lose_device)
        if what == "nan":
            model.set_model_unet_function_wrapper(lambda apply, args: torch.full_like(args["input"], torch.nan))
        return io.NodeOutput(model)


class ProbeMemory(io.ComfyNode):
    """Reports what the host counts of a model, and what its weights are stored as."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model", optional=True), io.Clip.Input("clip", optional=True)]
        return io.Schema("ProbeMemory", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, model=None, clip=None):
        patcher = clip.patcher if model is None else model
        parameters = dict(patcher.model.named_parameters())
        report = {
            "patcher": type(patcher).__name__,
            "size": patcher.model_size(),
            "loaded": patcher.loaded_size(),
            "parameters": sum(p.nbytes for p in parameters.values()),
            "dtypes": sorted({str(p.dtype) for p in parameters.values()}),
        }
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


def velocity_inputs():
    """Inputs of a denoiser of the embedded model's sizes, which the tests draw in their own process too."""
    generator = torch.Generator().manual_seed(3)
    x, tokens, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 32, 192), (1, 128)))
    return x, torch.tensor([0.7]), tokens, pooled, torch.tensor([3.0])


def whole(model, network, lora):
    comfy.model_management.load_models_gpu([model])
    return {"whole": network(*velocity_inputs())}


def partly(model, network, lora):
    """With the least that there is loaded, then half of what can be streamed, then a little less again."""
    comfy.model_management.unload_all_models()
    cpu, size, out, loaded = torch.device("cpu"), model.model_size(), {}, []
    least = sum(own.least for own in model.residents)
    for name, change in {
        "least": lambda: model.partially_load(cpu, 1),
        "half": lambda: model.partially_load(cpu, (size - least) * 0.6),
        "less": lambda: model.partially_unload(cpu, 1),
    }.items():
        change()
        out[name] = network(*velocity_inputs())
        loaded.append(model.loaded_size())
    model.detach()
    assert least == loaded[0] < loaded[1] < size, (least, loaded, size)
    assert loaded[2] < loaded[1], loaded
    return out


def hooked(model, network, lora):
    """With a LoRA as a hook that comes and goes twice, the second time from the host's cache, if its mode has one."""
    comfy.model_management.load_models_gpu([model])
    weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", lora))
    out = {}
    for mode in ("MaxSpeed", "MinVram"):
        model.hook_mode = comfy.hooks.EnumHookMode[mode]
        group = comfy.hooks.create_hook_lora(weights, 1.0, 1.0)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        model.register_all_hook_patches(group, target, {})
        for time_ in ("first", "second"):
            model.apply_hooks(group)
            out[f"hooked {mode} {time_}"] = network(*velocity_inputs())
            model.apply_hooks(None)
            out[f"plain {mode} {time_}"] = network(*velocity_inputs())
        model.clean_hooks()
        model.restore_hook_patches()
    return out


def merged(model, network, lora):
    """Half the weights of a merge of the model with itself, which has to be the model."""
    other = model.clone()
    other.add_patches(model.get_key_patches("diffusion_model."), 0.5, 0.5)
    return whole(other, network, lora)


def reloaded(model, network, lora):
    """Loaded once more in the way that the model tells the host."""
    factory, arguments, *_ = model.cached_patcher_init
    other = factory(*arguments, disable_dynamic=True)
    return whole(other, other.model.diffusion_model, lora)


def moved(model, network, lora):
    """After a packed layer was on another device and came back: its tensors have to be the file's again."""
    layer, cpu, elsewhere = network.single_blocks[0].linear1, torch.device("cpu"), torch.device("meta")
    holder, bias, layer.bias = torch.nn.Module(), layer.bias, None
    holder.layer = layer
    patcher = type(model).__base__(holder, load_device=elsewhere, offload_device=cpu)
    places = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for back in (lambda: patcher.unpatch_model(cpu), lambda: patcher.partially_unload(cpu, patcher.model_size() // 2)):
        patcher.patch_model(elsewhere)
        assert {parameter.device for parameter in layer.parameters()} == {elsewhere}
        back()
        assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == places
    patcher.detach()
    layer.bias = bias
    return whole(model, network, lora)


WAYS = {way.__name__: way for way in (whole, partly, hooked, merged, reloaded, moved)}


class ProbeVelocity(io.ComfyNode):
    """Reports a MODEL's velocities for fixed inputs, with its weights brought in one of several ways."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Model.Input("model"), io.Combo.Input("way", options=list(WAYS)), io.String.Input("lora", default=""),
        ]  # fmt: skip
        return io.Schema("ProbeVelocity", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, model, way, lora=""):
        velocities = WAYS[way](model.clone(), model.model.diffusion_model, lora)
        numbers = {name: velocity.float().flatten().tolist() for name, velocity in velocities.items()}
        return io.NodeOutput(ui={"report": [json.dumps(numbers)]})


def denoiser_inputs(case):
    """Inputs of a denoiser for a case of ``ProbeParity``, the same for every model."""
    generator = torch.Generator().manual_seed(case.get("seed", 11))

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    height, width = case.get("size", [8, 8])
    batch, text = case.get("batch", 1), case.get("text", 12)
    inputs = {
        "x": draw(batch, case.get("channels", 16), height, width), "timestep": torch.full((batch,), 0.7),
        "context": draw(batch, text, 192), "y": draw(batch, 128), "guidance": torch.full((batch,), 3.0),
    }  # fmt: skip
    if "references" in case:
        inputs["ref_latents"] = [draw(batch, 16, *size) for size in case["references"]]
        inputs |= {"ref_latents_method": case["method"]} if "method" in case else {}
    if "mask" in case:
        length = text + -(-height // 2) * -(-width // 2)
        mask = 2 * draw(batch, length, length)
        inputs["attention_mask"] = {
            "additive": mask, "boolean": mask > -1, "log": torch.log((mask > -1).float()),
        }[case["mask"]]  # fmt: skip
    return inputs


def as_our_views(case):
    """How references are looked at, as the pack's own input."""

    def region(view):
        return None if view.get("region") is None else torch.tensor(view["region"])[None, None]

    return {"fluxfoundry_references": tuple((view["strength"], region(view)) for view in case["views"])}


def as_mask(case):
    """The same, written out as an attention mask of all tokens, for a model that knows no views. Sizes are even."""
    text, (height, width) = case.get("text", 12), case.get("size", [8, 8])
    image = height * width // 4
    start, length = text + image, text + image + sum(h * w // 4 for h, w in case["references"])
    mask = torch.zeros(1, length, length)
    if "mask" in case:
        mask[:, :start, :start] = denoiser_inputs(case)["attention_mask"]
        mask[:, start:, :text] = mask[:, :1, :text]  # references look at the text as its first token does
    for (h, w), view in zip(case["references"], case["views"], strict=False):  # what has no view is plain
        own = range(start, start + h * w // 4)
        cells = torch.tensor(view.get("region") or [[1.0] * width] * height)
        inside = [float(cells[y : y + 2, x : x + 2].mean()) for y in range(0, height, 2) for x in range(0, width, 2)]
        for query in range(length):
            if query not in own:
                is_image = text <= query < text + image
                weight = view["strength"] * (inside[query - text] if is_image else min(inside))
                mask[:, query, own.start : own.stop] += torch.log(torch.tensor(weight))
        start = own.stop
    return {"attention_mask": mask}


def replaced_blocks(seen):
    """Patches on two blocks that note what they are given, and change the tokens a little."""

    def block(args, extra):
        seen.append([None if args["attn_mask"] is None else list(args["attn_mask"].shape), args["pe"].shape[2]])
        out = extra["original_block"](args)
        return {**out, "img": 1.01 * out["img"]}

    return {"patches_replace": {"dit": {("double_block", 0): block, ("single_block", 1): block}}}


def watched_attention(seen):
    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        shape = None if attn_mask is None else list(attn_mask.shape)
        seen.append([shape, extra_options.get("reference_image_num_tokens")])
        return {"q": 1.1 * q}

    return {"patches": {"attn1_patch": [patch]}}


def unmasked_blocks(seen):
    """A patch that takes the mask away from the block that it replaces."""

    def block(args, extra):
        return extra["original_block"]({**args, "attn_mask": None})

    return {"patches_replace": {"dit": {("double_block", 0): block}}}


WATCHED = {patch.__name__: patch for patch in (replaced_blocks, watched_attention, unmasked_blocks)}


class ProbeParity(io.ComfyNode):
    """Reports, for every case, how far two MODELs' velocities lie apart, and what patches on them were given."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("a"), io.Model.Input("b"), io.String.Input("cases")]
        return io.Schema("ProbeParity", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, a, b, cases):
        comfy.model_management.load_models_gpu([a, b])
        report = []
        for case in json.loads(cases):
            found = []
            for model, given in ((a, case), (b, {**case, **case.get("for_b", {})})):
                seen, options = [], {}
                if "patch" in case:
                    options = WATCHED[case["patch"]](seen)
                if "rope" in case:
                    options["rope_options"] = case["rope"]
                inputs = denoiser_inputs(given)
                if "views" in case:
                    inputs |= (as_our_views if model is a else as_mask)(given)
                out = model.model.diffusion_model(**inputs, transformer_options=options)
                found.append((out, seen))
            (one, told), (other, told_other) = found
            changes = ("references", "mask", "patch", "rope") if "views" not in case else ("views", "mask", "patch")
            plain = {name: value for name, value in case.items() if name not in changes}
            alone = b.model.diffusion_model(**denoiser_inputs(plain))
            error, effect = (float((v - other).abs().max() / other.abs().max()) for v in (one, alone))
            report.append({"error": error, "effect": effect, "told": told, "told_other": told_other})
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class RandomStyle:
    """A style model that gives the same tokens for whatever it is shown."""

    def get_cond(self, output):
        return output + torch.randn(1, 9, 192, generator=torch.Generator().manual_seed(8))


class ProbeStyle(io.ComfyNode):
    """A style model, and what it is shown."""

    @classmethod
    def define_schema(cls):
        outputs = [io.StyleModel.Output(), io.ClipVisionOutput.Output()]
        return io.Schema("ProbeStyle", category="probe", inputs=[], outputs=outputs)

    @classmethod
    def execute(cls):
        return io.NodeOutput(RandomStyle(), torch.zeros(1))


class ProbePicture(io.ComfyNode):
    """A picture of random patches, of any size."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input(name, default=128) for name in ("width", "height", "seed")]
        return io.Schema("ProbePicture", category="probe", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, width, height, seed):
        patches = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        picture = torch.nn.functional.interpolate(patches, (height, width), mode="nearest")
        return io.NodeOutput(picture.movedim(1, -1))


class ProbeControls(io.ComfyNode):
    """A control picture for a slot of a MODEL."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Conditioning.Input("conditioning"), io.Latent.Input("latent"), io.Int.Input("slot", default=2),
                  io.Boolean.Input("ours", default=True)]  # fmt: skip
        return io.Schema("ProbeControls", category="probe", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning, latent, slot, ours):
        samples, key = latent["samples"], "fluxfoundry_controls"

        def with_picture(extra):
            if not ours:
                return {**extra, "concat_latent_image": samples}
            return {**extra, key: {**extra.get(key, {}), slot: samples}}

        return io.NodeOutput([[text, with_picture(extra)] for text, extra in conditioning])


class ProbeConditions(io.ComfyNode):
    """Reports the shapes of what a CONDITIONING carries, entry by entry."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Conditioning.Input("conditioning"), io.Custom("FLUXFOUNDRY_CROP").Input("crop", optional=True),
                  io.Latent.Input("latent", optional=True)]  # fmt: skip
        return io.Schema("ProbeConditions", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, conditioning, crop=None, latent=None):
        def told(value):
            if isinstance(value, torch.Tensor):
                return list(value.shape)
            if isinstance(value, dict):
                return {str(key): told(one) for key, one in value.items()}
            return [told(one) for one in value] if isinstance(value, (list, tuple)) else value

        keys = (
            "reference_latents",
            "reference_latents_method",
            "fluxfoundry_references",
            "start_percent",
            "end_percent",
        )
        report = {"entries": [{key: told(extra[key]) for key in keys if key in extra} for _, extra in conditioning]}
        if crop is not None:
            report["crop"] = {"picture": list(crop.picture.shape), "original": list(crop.original.shape)}
        if latent is not None:
            report["latent"] = list(latent["samples"].shape)
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbeText(io.ComfyNode):
    """Reports a conditioning's numbers."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Conditioning.Input("text")]
        return io.Schema("ProbeText", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, text):
        [[tokens, more]] = text
        report = {"tokens": tokens.flatten().tolist(), "pooled": more["pooled_output"].flatten().tolist()}
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class Probes(ComfyExtension):
    async def get_node_list(self):
        return [
            ProbeConditioning, ProbeCompare, ProbePick, ProbeModel, ProbeForeignLatent, ProbeTokens, ProbeTable,
            ProbeMemory, ProbeVelocity, ProbeText, ProbeParity, ProbeGraphs,
            ProbeStyle, ProbePicture, ProbeControls, ProbeConditions, *memory.NODES,
        ]  # fmt: skip


async def comfy_entrypoint():
    return Probes()
