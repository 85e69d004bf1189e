"""What every node tells its user, and the contract with saved graphs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"

# Node ids, inputs in order (widgets are saved by position), outputs in order. New inputs come last.
CONTRACT = {
    "FluxFoundryLoadModel": (["model", "dtype", "variant", "memory", "budget"], ["Model"]),
    "FluxFoundryLoadTextEncoders": (["clip_l", "t5", "t5_length", "memory", "budget"], ["Clip"]),
    "FluxFoundryLoadAutoencoder": (["vae", "memory", "budget"], ["Vae"]),
    "FluxFoundryLoadEmbedded": (["model"], ["Model", "Clip", "Vae"]),
    "FluxFoundryTextEncode": (
        ["clip", "prompt", "guidance", "negative", "clip_prompt", "t5_prompt", "cache"],
        ["Conditioning", "Conditioning"],
    ),
    "FluxFoundryClearPromptCache": (["where"], ["String"]),
    "FluxFoundryEmptyLatent": (["aspect", "megapixels", "width", "height", "batch_size"], ["Latent", "Int", "Int"]),
    "FluxFoundryDecode": (["vae", "latent"], ["Image"]),
    "FluxFoundrySchedule": (
        ["model", "steps", "schedule", "denoise", "width", "height", "explicit", "latent", "mu"],
        ["Sigmas"],
    ),
    "FluxFoundrySampler": (
        [
            "model", "positive", "latent", "seed", "steps", "guidance", "schedule", "solver", "denoise", "negative",
            "cfg", "sigmas",
        ],
        ["Latent"],
    ),
    "FluxFoundryInpaintCrop": (
        ["image", "mask", "side", "context", "min_context", "grow", "blur", "fill_holes", "invert", "multiple"],
        ["Image", "Mask", "FLUXFOUNDRY_CROP"],
    ),
    "FluxFoundryStitch": (["image", "crop", "colour_match"], ["Image"]),
    "FluxFoundryOutpaint": (
        ["image", "left", "right", "top", "bottom", "aspect", "anchor", "feather", "fill"],
        ["Image", "Mask", "FLUXFOUNDRY_CROP"],
    ),
    "FluxFoundryFill": (
        [
            "positive", "vae", "image", "mask", "strength", "start", "end", "rounding", "noise_mask", "negative",
            "region",
        ],
        ["Conditioning", "Conditioning", "Latent"],
    ),
    "FluxFoundryControl": (
        [
            "positive", "vae", "image", "kind", "low", "high", "automatic", "fit", "strength", "start", "end", "slot",
            "negative", "latent", "region",
        ],
        ["Conditioning", "Conditioning", "Latent", "Image"],
    ),
    "FluxFoundryCanny": (["image", "low", "high", "automatic"], ["Image"]),
    "FluxFoundryDepth": (["image", "model", "normalisation", "invert"], ["Image"]),
    "FluxFoundryLoadControlLora": (["model", "lora", "strength"], ["Model"]),
    "FluxFoundryLoadRedux": (["redux", "vision_tower", "memory", "budget"], ["StyleModel", "ClipVision"]),
    "FluxFoundryRedux": (
        [
            "conditioning", "style_model", "clip_vision", "image", "strength", "strength_mode", "detail", "max_tokens",
            "fit", "start", "end", "mask", "region",
        ],
        ["Conditioning"],
    ),
    "FluxFoundryReference": (
        [
            "conditioning", "vae", "image", "strength", "start", "end", "layout", "fit", "max_megapixels", "region",
        ],
        ["Conditioning", "Latent", "FLUXFOUNDRY_CROP"],
    ),
    "FluxFoundryCombine": (
        ["model_1", "conditioning_1", "model_2", "conditioning_2", "balance"], ["Model", "Conditioning"],
    ),
    "FluxFoundryStepCache": (["model", "threshold", "max_skips", "warmup"], ["Model"]),
    "FluxFoundryMemoryPlan": (
        [
            "model", "width", "height", "batch_size", "steps", "memory", "budget", "clip", "vae", "clip_vision",
            "conditioning", "latent", "cfg",
        ],
        ["String", "Image", "Float"],
    ),
    "FluxFoundryMemoryReport": (["image"], ["String", "Image"]),
    "FluxFoundryCompile": (["model", "dynamic"], ["Model"]),
    "FluxFoundryInspectFile": (["file", "model"], ["String"]),
    "FluxFoundrySaveModel": (["model", "filename_prefix", "format", "layout"], ["String"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes(part) -> dict:
    return {node.define_schema().node_id: node for node in part("nodes").NODES}


def test_the_nodes_are_those_of_the_contract(nodes: dict) -> None:
    assert sorted(nodes) == sorted(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_inputs_and_outputs_keep_their_order(nodes: dict, name: str) -> None:
    schema = nodes[name].define_schema()
    assert ([i.id for i in schema.inputs], [o.kind for o in schema.outputs]) == CONTRACT[name]


@pytest.mark.parametrize("name", CONTRACT)
def test_everything_has_a_title_a_description_and_tooltips(nodes: dict, name: str) -> None:
    schema = nodes[name].define_schema()
    assert schema.display_name
    assert schema.description
    assert schema.category.startswith("FLUX Foundry/")
    assert all(len(field.tooltip or "") > 15 for field in (*schema.inputs, *schema.outputs))
    assert all(output.display_name for output in schema.outputs)


@pytest.mark.parametrize("name", CONTRACT)
def test_execute_takes_every_input_and_defaults_the_optional_ones(nodes: dict, name: str) -> None:
    schema = nodes[name].define_schema()
    parameters = inspect.signature(nodes[name].execute).parameters
    assert sorted(parameters) == sorted(i.id for i in schema.inputs)
    for field in schema.inputs:
        assert (parameters[field.id].default is not inspect.Parameter.empty) == bool(field.optional), field.id


@pytest.mark.parametrize("name", CONTRACT)
def test_defaults_lie_in_their_range(nodes: dict, name: str) -> None:
    for field in nodes[name].define_schema().inputs:
        if field.kind == "Combo":
            assert field.default is None or field.default in field.options["options"]
        elif field.min is not None and field.default is not None:
            assert field.min <= field.default <= field.max


@pytest.mark.parametrize("name", CONTRACT)
def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(nodes: dict, name: str) -> None:
    schema = nodes[name].define_schema()
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    named = {word for cell in re.findall(r"\| \*\*(.+?)\*\* \|", page) for word in re.split(r", ", cell)}
    assert {field.id for field in schema.inputs} <= named
    assert {output.display_name for output in schema.outputs} <= named
    assert "## A small graph" in page
    assert "## What goes wrong" in page


def test_help_pages_belong_to_nodes() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == set(CONTRACT)


def test_a_seed_goes_up_to_the_last_one_that_noise_can_be_drawn_from(nodes: dict) -> None:
    [seed] = [i for i in nodes["FluxFoundrySampler"].define_schema().inputs if i.id == "seed"]
    assert (seed.min, seed.max, seed.control_after_generate) == (0, 2**64 - 1, True)


def test_fewer_than_one_step_cannot_be_asked_for(nodes: dict) -> None:
    for name in ("FluxFoundrySampler", "FluxFoundrySchedule"):
        [steps] = [i for i in nodes[name].define_schema().inputs if i.id == "steps"]
        assert steps.min == 1


def test_fields_that_an_old_host_lacks_are_left_out_and_a_new_ones_kept(part, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    fields = part("nodes.fields")

    @dataclasses.dataclass
    class Newer:
        node_id: str
        search_aliases: list[str]

    assert fields.schema(node_id="a", search_aliases=["b"]).node_id == "a"
    monkeypatch.setattr(fields.io, "Schema", Newer)
    assert fields.schema(node_id="a", search_aliases=["b"], display_name="c").search_aliases == ["b"]
