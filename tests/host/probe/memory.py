"""Probes of what stays on the device, and of how the host takes it back."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import threading
from unittest import mock

import comfy.model_management
import comfy.utils
import psutil
import torch
from comfy_api.latest import io

CPU = torch.device("cpu")
LAYER = "diffusion_model.single_blocks.1.linear1.weight"


def velocity(model):
    """Of fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x, tokens, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 32, 192), (1, 128)))
    return model.model.diffusion_model(x, torch.tensor([0.7]), tokens, pooled, torch.tensor([3.0]))


def streamed(model):
    """The places of blocks that are streamed."""
    [own] = model.residents
    return list(own.footprint.blocks.streamed)


def probe(name, execute):
    """An output node that takes a MODEL and reports what a function of it says."""

    class Probe(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            inputs = [io.Model.Input("model")]
            return io.Schema(name, category="probe", inputs=inputs, outputs=[], is_output_node=True)

        @classmethod
        def execute(cls, model):
            return io.NodeOutput(ui={"report": [json.dumps(execute(model))]})

    Probe.__name__ = name
    return Probe


def residents(model):
    """What the host counts of a loaded model, and what is there."""
    comfy.model_management.load_models_gpu([model])
    [own] = model.residents
    return {
        "size": model.model_size(), "loaded": model.loaded_size(), "resident": own.resident_bytes,
        "whole": own.accounts.footprint().device_bytes, "streamed": streamed(model),
        "blocks": len(own.accounts.blocks),
    }  # fmt: skip


def all_there(model):
    """Whether all that is counted as staying is on the device, and nothing else of the blocks."""
    [own] = model.residents
    inside = {
        f"{own.prefix}{name.rpartition('.')[0]}"
        for block in own.accounts.blocks for name in own.accounts.names_in(block, own.apart)
    }  # fmt: skip
    layers = {name: comfy.utils.get_attr(model.model, name) for name in inside}
    there = {name for name, layer in layers.items() if getattr(layer, "comfy_patched_weights", False)}
    return there == inside - own.away


def give_way(model):
    """Asked for a little again and again, then loaded as before."""
    comfy.model_management.load_models_gpu([model])
    [own] = model.residents
    before, asked = velocity(model), 100
    report = {"asked": asked, "freed": [], "streamed": [], "blocks": len(own.accounts.blocks), "equal": True}
    report["there"] = all_there(model)
    while own.resident_bytes > own.least:
        report["freed"].append(model.partially_unload(CPU, asked))
        report["streamed"].append(len(streamed(model)))
        report["equal"] &= torch.equal(velocity(model), before)
        report["there"] &= all_there(model)
    comfy.model_management.load_models_gpu([model])
    return {**report, "back": model.loaded_size(), "size": model.model_size()}


def on_a_card(model):
    """What a run takes beside weights here, and where plans are those of a card, which unpacks them as they run."""
    [own] = model.residents
    home, management = sys.modules[type(own).__module__], comfy.model_management
    spec, dtype = model.model.spec, model.model.get_dtype_inference()
    here, outlines = own.working_for(spec, dtype, home.ANY, 0), own.outlines
    with mock.patch.object(management, "is_device_cpu", return_value=False):
        card = home.outlines_of(own._bindings, own.accounts, dtype, torch.device("cuda"))
    runs = []
    with mock.patch.object(type(model.model), "_packed_layers", return_value=()):  # of which the host is told besides
        for own.outlines in (card, outlines):
            model.model.memory_required((1, 16, 8, 8))
            runs.append(own.working)
    own.outlines = card
    there = own.working_for(spec, dtype, home.ANY, 0)
    own.outlines = outlines
    return {"outlined": [outlines is not None, bool(card)], "here": here, "there": there, "runs": runs}


@contextlib.contextmanager
def small_card(room, *models, state="NORMAL_VRAM", reserve=0):
    """The host as on a card of so many bytes, on which nothing else is, with its own rules of who gives way.

    Args:
        room: Bytes.
        *models: That will be loaded.
        state: What the host makes of its flags ``--novram``, ``--lowvram``, ``--highvram``.
        reserve: Bytes of ``--reserve-vram``.
    """
    management = comfy.model_management
    management.unload_all_models()

    def free(dev=None, torch_free_too=False):
        left = room - sum(model.loaded_size() for model in models)
        return (left, left) if torch_free_too else left

    pretended = {
        "is_device_cpu": lambda device: False, "get_free_memory": free, "minimum_inference_memory": lambda: reserve,
        "extra_reserved_memory": lambda: reserve, "lowvram_available": True,
        "vram_state": management.VRAMState[state],
        "MIN_WEIGHT_MEMORY_RATIO": 0.0,
    }  # fmt: skip
    before = {name: getattr(management, name) for name in pretended}
    devices = [model.load_device for model in models]
    try:
        for name, value in pretended.items():
            setattr(management, name, value)
        for model in models:
            model.load_device = torch.device("cpu", 0)  # to the host another device than the one where models rest
        yield free
    finally:
        management.unload_all_models()
        for name, value in before.items():
            setattr(management, name, value)
        for model, device in zip(models, devices, strict=True):
            model.load_device = device


class ProbeSmallCard(io.ComfyNode):
    """Two models in turn where there is room for one and a half; reports what each has, and whether both still run."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("one"), io.Model.Input("other"), io.Float.Input("share", default=1.5)]
        return io.Schema("ProbeSmallCard", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, one, other, share):
        expected = [velocity(model) for model in (one, other)]
        room, rounds = int(share * one.model_size()), []
        with small_card(room, one, other) as free:
            for turn in range(6):
                model = (one, other)[turn % 2]
                comfy.model_management.load_models_gpu([model])
                rounds.append({
                    "running": model.loaded_size(), "waiting": (other, one)[turn % 2].loaded_size(), "free": free(),
                    "equal": torch.equal(velocity(model), expected[turn % 2]),
                })  # fmt: skip
        report = {"room": room, "size": one.model_size(), "rounds": rounds}
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


def patched(model):
    """With a patch that comes and goes."""
    comfy.model_management.load_models_gpu([model])
    [own] = model.residents
    plain, streamer = velocity(model), own.flow.streamer
    other = model.clone()
    other.add_patches({LAYER: ("diff", (torch.full((1792, 256), 0.01),))})
    comfy.model_management.load_models_gpu([other])
    changed = velocity(other)
    stays = own.flow.streamer is streamer
    comfy.model_management.load_models_gpu([model])
    stays &= own.flow.streamer is streamer
    return {
        "streamer_stays": stays, "changed": float((changed - plain).abs().max()),
        "back": float((velocity(model) - plain).abs().max()),
    }  # fmt: skip


def flags(model):
    """What stays under each of the host's flags, on a card that has room for the model and a little more."""
    expected, size = velocity(model), model.model_size()
    [own] = model.residents
    report = {"size": size, "least": own.least}
    room = size + 1_000_000
    for name, state, reserve in (
        ("novram", "NO_VRAM", 0), ("lowvram", "LOW_VRAM", 0), ("highvram", "HIGH_VRAM", 0),
        ("reserve", "NORMAL_VRAM", 2_000_000), ("none", "NORMAL_VRAM", 0),
    ):  # fmt: skip
        with small_card(room, model, state=state, reserve=reserve):
            comfy.model_management.load_models_gpu([model])
            assert torch.equal(velocity(model), expected)
            report[name] = model.loaded_size()
    return report


class Failing:
    """Steps of a MODEL, in the next ``times`` of which memory runs out."""

    def __init__(self, model):
        self.base, self.network, self.times = model.model, model.model.diffusion_model, 0
        self.base.current_patcher = model

    def __enter__(self):
        self.network.forward = self.forward
        return self

    def __exit__(self, *_):
        del self.network.forward

    def forward(self, *given, **named):
        if self.times > 0:
            self.times -= 1
            raise torch.OutOfMemoryError("no memory, for a test")
        return type(self.network).forward(self.network, *given, **named)

    def step(self):
        generator = torch.Generator().manual_seed(3)
        shapes = (1, 16, 8, 8), (1, 32, 192), (1, 128)
        x, tokens, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
        guidance = torch.tensor([3.0])
        return self.base.apply_model(x, torch.tensor([0.7]), c_crossattn=tokens, y=pooled, guidance=guidance)


def runs_out(model):
    """Memory runs out in one step, then in every one."""
    comfy.model_management.load_models_gpu([model])
    report = {"streamed_before": len(streamed(model))}
    with Failing(model) as steps:
        expected = steps.step()
        steps.times = 1
        report["equal"] = torch.equal(steps.step(), expected)
        report["streamed_after"] = len(streamed(model))
        report["there"] = all_there(model)
        steps.times = 1000
        try:
            steps.step()
        except torch.OutOfMemoryError as error:
            report["gave_up"] = str(error)
        steps.times = 0
        report["afterwards"] = torch.equal(steps.step(), expected)
    return report


class ProbeOthersFirst(io.ComfyNode):
    """Memory runs out in two steps of a MODEL while another one waits on the card; reports who left."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("one"), io.Model.Input("other")]
        return io.Schema("ProbeOthersFirst", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, one, other):
        report = {"waits": [], "streamed": []}
        with small_card(4 * one.model_size(), one, other):
            comfy.model_management.load_models_gpu([other])
            comfy.model_management.load_models_gpu([one])
            with Failing(one) as steps:
                for times in (0, 1, 1):
                    steps.times = times
                    expected = steps.step()
                    report["waits"].append(other.loaded_size())
                    report["streamed"].append(len(streamed(one)))
                report["equal"] = torch.equal(steps.step(), expected)
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbeThreads(io.ComfyNode):
    """Reports how many threads read weights."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            "ProbeThreads", category="probe", inputs=[io.Latent.Input("latent")], outputs=[], is_output_node=True
        )

    @classmethod
    def execute(cls, latent):
        readers = sum(thread.name.startswith("weights") for thread in threading.enumerate())
        return io.NodeOutput(ui={"report": [json.dumps({"readers": readers})]})


class ProbeSeen(io.ComfyNode):
    """Reports what a vision tower saw."""

    @classmethod
    def define_schema(cls):
        inputs = [io.ClipVisionOutput.Input("seen")]
        return io.Schema("ProbeSeen", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, seen):
        return io.NodeOutput(ui={"report": [json.dumps({"last": seen.last_hidden_state.flatten().tolist()})]})


class ProbeStrips(io.ComfyNode):
    """Reports how far two pictures lie apart, what the host makes room for, and what is drawn when memory runs out."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Image.Input("one"), io.Image.Input("other"), io.Vae.Input("vae"), io.Vae.Input("striped"),
            io.Latent.Input("latent"),
        ]  # fmt: skip
        return io.Schema("ProbeStrips", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, one, other, vae, striped, latent):
        large = (1, 16, 256, 256)
        room = [own.memory_used_decode(large, torch.float32) for own in (vae, striped)]
        decode = vae.first_stage_model.decode_mean

        def fail(latents):
            raise torch.OutOfMemoryError("no memory, for a test")

        vae.first_stage_model.decode_mean = fail
        try:
            again = vae.decode(latent["samples"])
        finally:
            del vae.first_stage_model.decode_mean
        assert vae.first_stage_model.decode_mean == decode
        report = {
            "largest": float((one - other).abs().max()), "room": room,
            "after_oom": float((again - one).abs().max()),
        }  # fmt: skip
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbeTaken(io.ComfyNode):
    """Reports what the process takes, and what the host counts of all models."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Image.Input("image")]
        return io.Schema("ProbeTaken", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, image):
        gc.collect()
        loaded = comfy.model_management.current_loaded_models
        report = {
            "resident_set": psutil.Process().memory_info().rss,
            "loaded": sum(own.model_loaded_memory() for own in loaded if own.model is not None),
            "readers": sum(thread.name.startswith("weights") for thread in threading.enumerate()),
        }
        return io.NodeOutput(ui={"report": [json.dumps(report)]})


class ProbeTold(io.ComfyNode):
    """Reports a text."""

    @classmethod
    def define_schema(cls):
        inputs = [io.String.Input("text", force_input=True)]
        return io.Schema("ProbeTold", category="probe", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(ui={"report": [json.dumps({"text": text})]})


NODES = [
    probe("ProbeResidents", residents), probe("ProbeGiveWay", give_way), ProbeSmallCard,
    probe("ProbePatched", patched), probe("ProbeFlags", flags), probe("ProbeRunsOut", runs_out),
    probe("ProbeOnACard", on_a_card),
    ProbeOthersFirst, ProbeThreads, ProbeSeen,
    ProbeStrips,
    ProbeTold,
    ProbeTaken,
]  # fmt: skip
