"""Nodes for the tests of FLUX Redux: the host's own small vision tower and Redux, and looks at what comes out."""

from __future__ import annotations

import json

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

TOWER = {
    "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 128, "image_size": 126, "patch_size": 14,
    "intermediate_size": 384, "model_type": "siglip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 4,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
TOWERS = {
    "same": TOWER,
    "clip": {**TOWER, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
    "narrow": {**TOWER, "hidden_size": 64},
}


class ProbeStyleModels(io.ComfyNode):
    """The host's Redux and vision tower at the embedded ones' sizes, which its loaders do not recognise."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.String.Input("redux", default=""), io.String.Input("tower", default=""),
            io.Combo.Input("kind", options=list(TOWERS)), io.Int.Input("text_width", default=192),
        ]  # fmt: skip
        outputs = [io.StyleModel.Output(), io.ClipVision.Output()]
        return io.Schema("ProbeStyleModels", category="probe", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(cls, redux, tower, kind, text_width):
        model = comfy.ldm.flux.redux.ReduxImageEncoder(128, text_width)
        vision = comfy.clip_vision.ClipVisionModel(TOWERS[kind])
        if redux:
            path = folder_paths.get_full_path_or_raise("style_models", redux)
            model.load_state_dict(comfy.utils.load_torch_file(path, safe_load=True))
        if tower:
            path = folder_paths.get_full_path_or_raise("clip_vision", tower)
            missing, unexpected = vision.load_sd(comfy.utils.load_torch_file(path, safe_load=True))
            assert not missing, missing
            assert not unexpected, unexpected
        return io.NodeOutput(comfy.sd.StyleModel(model), vision)


class ProbeVision(io.ComfyNode):
    """Reports how far two CLIP_VISION_OUTPUTs lie apart, in each of what they hold."""

    @classmethod
    def define_schema(cls):
        inputs = [io.ClipVisionOutput.Input("a"), io.ClipVisionOutput.Input("b")]
        return io.Schema("ProbeVision", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, a, b):
        names = ("last_hidden_state", "image_embeds", "penultimate_hidden_states", "all_hidden_states")
        report = {name: far(a[name], b[name]) for name in names}
        report["sizes"] = [list(map(list, output["image_sizes"])) for output in (a, b)]
        report["projected"] = [output["mm_projected"] for output in (a, b)]
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbeStyled(io.ComfyNode):
    """Reports what one CONDITIONING holds, and how far another lies from it."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Conditioning.Input("a"), io.Conditioning.Input("b", optional=True)]
        return io.Schema("ProbeStyled", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, a, b=None):
        entries = [
            {
                "tokens": text.shape[1],
                "times": [extra.get("start_percent", 0.0), extra.get("end_percent", 1.0)],
                "grid": extra.get("attention_mask_img_shape"),
                "mask": None if "attention_mask" not in extra else list(extra["attention_mask"].shape),
                "finite": bool(torch.isfinite(extra.get("attention_mask", text)).all()),
                "guidance": extra.get("guidance"),
            }
            for text, extra in a
        ]
        report = {"entries": entries}
        if b is not None:
            [[text, extra]], [[other, more]] = a, b
            report["text"] = far(text, other)
            report["masks"] = ["attention_mask" in each for each in (extra, more)]
            if all(report["masks"]):
                report["mask"] = far(extra["attention_mask"].float(), more["attention_mask"].float())
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


def far(a, b):
    """The largest difference, by the spread of the numbers; None where they have different shapes."""
    return float((a - b).abs().max() / a.std()) if a.shape == b.shape else None


class Probes(ComfyExtension):
    async def get_node_list(self):
        return [ProbeStyleModels, ProbeVision, ProbeStyled]


async def comfy_entrypoint():
    return Probes()
