"""FLUX Redux beside the core's style nodes: the same where both can do it, together in one graph, and what only it can.

The weights are random, in fp16 as the host keeps a vision tower's, so that both loaders have the same numbers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from client import Host, Prompt, find_comfyui, prepare, serve
from graph import core_sampler, node, our_sampler, start
from pictures import pixels
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux.mini.files import MINI
from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.ops.layers import on_meta
from flux.pipelines.redux import ReduxPicture, open_redux_encoder
from flux.preprocess.vision import VIEWS, vision_pixels
from flux.specs.vision import REDUX, REDUX_MINI, SIGLIP_MINI, SIGLIP_SO400M
from tests.tiny import write_header_only

HERE = Path(__file__).resolve().parent
ADAPTER, TOWER = "redux.safetensors", "siglip.safetensors"
TEXT, GRID = 32, 9  # tokens of the embedded encoder's prompt, and along a side of the embedded tower's picture
LEVEL = 1.5 / 255  # a shown picture's levels are cut, not rounded
CLOSE = 5e-4  # of the numbers' spread: fp32 in another order, the largest of many
SAMPLED = 1e-3  # the same after some steps


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A ComfyUI with the pack, this file's probes, random models of the embedded sizes, and pictures to take over."""
    comfyui = find_comfyui()
    assert comfyui is not None
    base = tmp_path_factory.mktemp("comfyui-redux")
    prepare(base)
    shutil.copytree(HERE / "probe_styles", base / "custom_nodes" / "probe_styles")
    for folder in ("style_models", "clip_vision"):
        (base / "models" / folder).mkdir(exist_ok=True)
    write_random(base / "models" / "style_models" / ADAPTER, Redux, REDUX_MINI, 1)
    write_random(base / "models" / "clip_vision" / TOWER, SiglipVision, SIGLIP_MINI, 2)
    write_zeros(base / "models" / "style_models" / "real-redux.safetensors", Redux, REDUX)
    write_zeros(base / "models" / "clip_vision" / "real-tower.safetensors", SiglipVision, SIGLIP_SO400M)
    shutil.copy(MINI.clip, base / "models" / "clip_vision" / "a-text-encoder.safetensors")
    shutil.copy(MINI.clip, base / "models" / "style_models" / "a-text-encoder.safetensors")
    for name, size in {"square": (126, 126), "other": (126, 126), "wide": (400, 200)}.items():
        write_picture(base / "input" / f"{name}.png", size, len(name))
    with serve(comfyui, base) as running:
        yield running


def shapes_of(build: type, spec: object) -> dict[str, tuple[int, ...]]:
    with on_meta():
        return {name: tuple(parameter.shape) for name, parameter in build(spec).named_parameters()}


def write_zeros(path: Path, build: type, spec: object) -> None:
    write_header_only(path, shapes_of(build, spec))


def write_random(
    path: Path, build: type, spec: object, seed: int, change: Callable[[Tensor], Tensor] = Tensor.half
) -> None:
    """``change`` is applied to the weights of linear layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes_of(build, spec).items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            numbers = numbers * math.sqrt(2 / math.prod(shape[1:]))
        else:
            numbers = 0.1 * numbers + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        tensors[name] = change(numbers) if numbers.ndim == 2 and "embedding" not in name else numbers.half()
    save_file(tensors, path)


def write_picture(path: Path, size: tuple[int, int], seed: int) -> None:
    """Blocks of colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(path)


def styling(**more: dict) -> Prompt:
    """A prompt, our Redux and tower, the core's own with the same weights, and a picture of the tower's size."""
    return {
        **start(),
        "core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "ours": node("FluxFoundryLoadRedux", redux=ADAPTER, vision_tower=TOWER),
        "theirs": node("ProbeStyleModels", redux=ADAPTER, tower=TOWER, kind="same", text_width=192),
        "square": node("LoadImage", image="square.png"),
        "other": node("LoadImage", image="other.png"),
        "wide": node("LoadImage", image="wide.png"),
        "seen": node("CLIPVisionEncode", clip_vision=["ours", 1], image=["square", 0], crop="none"),
        **more,
    }


def redux(source: str = "ours", text: str = "text", image: str = "square", **changes: object) -> dict:
    settings = {
        "strength": 1.0, "strength_mode": "attention", "detail": 0, "max_tokens": 0, "fit": "stretch", "start": 0.0,
        "end": 1.0,
    }  # fmt: skip
    wires = {"conditioning": [text, 0], "style_model": [source, 0], "clip_vision": [source, 1], "image": [image, 0]}
    return node("FluxFoundryRedux", **{**wires, **settings, **changes})


def core_style(source: str = "ours", text: str = "text", **changes: object) -> dict:
    settings = {"strength": 1.0, "strength_type": "multiply"}
    wires = {"conditioning": [text, 0], "style_model": [source, 0], "clip_vision_output": ["seen", 0]}
    return node("StyleModelApply", **{**wires, **settings, **changes})


def half(name: str = "half", size: int = 128) -> Prompt:
    """A mask that is white on the left."""
    return {
        f"{name} black": node("SolidMask", value=0.0, width=size, height=size),
        f"{name} white": node("SolidMask", value=1.0, width=size // 2, height=size),
        name: node("MaskComposite", destination=[f"{name} black", 0], source=[f"{name} white", 0], x=0, y=0,
                   operation="add"),
    }  # fmt: skip


def styled(host: Host, a: dict, b: dict | None = None, **more: dict) -> dict:
    """What ProbeStyled says of one or two CONDITIONINGs."""
    inputs = {"a": ["a", 0], **({} if b is None else {"b": ["b", 0]})}
    nodes = {"a": a, **({} if b is None else {"b": b}), "out": node("ProbeStyled", **inputs)}
    return host.succeed(styling(**more, **nodes)).report()


def entry(host: Host, a: dict, **more: dict) -> dict:
    """The only entry of a CONDITIONING."""
    [only] = styled(host, a, **more)["entries"]
    return only


def drawn_apart(host: Host, a: str, b: str, samplers: tuple[dict, dict] | None = None, /, **more: dict) -> float:
    """How far two CONDITIONINGs' latents lie apart under the core's MODEL and sampler, by their spread."""
    one, other = samplers or (
        core_sampler("core", steps=3, positive=[a, 0]), core_sampler("core", steps=3, positive=[b, 0]),
    )  # fmt: skip
    nodes = {"one": one, "two": other, "out": node("ProbeCompare", a=["one", 0], b=["two", 0])}
    report = host.succeed(styling(**more, **nodes)).report()
    return report["largest"] / report["spread"]


# Our models in the core's nodes, and the core's in ours.


@pytest.mark.parametrize("crop", ["none", "center"])
@pytest.mark.parametrize("image", ["square", "wide"])
def test_the_cores_encode_node_gives_the_same_with_our_tower_and_its_own(host: Host, crop: str, image: str) -> None:
    seen = {
        name: node("CLIPVisionEncode", clip_vision=[name, 1], image=[image, 0], crop=crop)
        for name in ("ours", "theirs")
    }
    outputs = {f"seen by {name}": encode for name, encode in seen.items()}
    out = node("ProbeVision", a=["seen by ours", 0], b=["seen by theirs", 0])
    report = host.succeed(styling(**outputs, out=out)).report()
    assert report["sizes"] == [[[3, 126, 126]]] * 2
    assert report["projected"] == [None, None]
    for name in ("last_hidden_state", "image_embeds", "penultimate_hidden_states", "all_hidden_states"):
        assert report[name] < CLOSE, name


@pytest.mark.parametrize("kind", ["multiply", "attn_bias"])
def test_the_cores_style_node_gives_the_same_with_our_redux_and_its_own(host: Host, kind: str) -> None:
    settings = {"strength": 0.6, "strength_type": kind}
    report = styled(host, core_style("ours", **settings), core_style("theirs", **settings))
    assert report["text"] < CLOSE


def test_our_node_gives_the_same_with_our_models_and_the_cores(host: Host) -> None:
    # Not with "pad", whose grey is between two of the 8-bit levels that the core's tower rounds to.
    settings = {"image": "wide", "strength": 0.6, "fit": "tiled", "detail": 4, "mask": ["half", 0]}
    report = styled(host, redux("ours", **settings), redux("theirs", **settings), **half())
    assert report["text"] < CLOSE
    assert report["mask"] == 0


def test_what_the_tower_sees_is_shown(host: Host) -> None:
    shown = node("PreviewAny", source=["styled", 0])
    outcome = host.succeed(styling(styled=redux(image="wide", fit="tiled"), shown=shown))
    seen = [pixels(png) for png in host.pictures_of(outcome, "styled", kind="temp")]
    picture = torch.tensor(np.array(Image.open(host.base / "input" / "wide.png").convert("RGB")))[None] / 255
    wanted = vision_pixels(picture, SIGLIP_MINI.side, "tiled").shown()
    assert len(seen) == len(wanted) > 1
    assert all(np.abs(one / 255 - view.numpy()).max() < LEVEL for one, view in zip(seen, wanted, strict=True))


def test_files_in_fp8_stay_packed_and_give_what_their_numbers_give(host: Host) -> None:
    for kind, change in {"fp8": to_fp8, "rounded": lambda numbers: to_fp8(numbers).half()}.items():
        write_random(host.base / "models" / "style_models" / f"{kind}-{ADAPTER}", Redux, REDUX_MINI, 1, change)
        write_random(host.base / "models" / "clip_vision" / f"{kind}-{TOWER}", SiglipVision, SIGLIP_MINI, 2, change)
    pairs = {
        kind: node("FluxFoundryLoadRedux", redux=f"{kind}-{ADAPTER}", vision_tower=f"{kind}-{TOWER}")
        for kind in ("fp8", "rounded")
    }
    report = styled(host, redux("fp8"), redux("rounded"), **pairs)
    assert report["text"] < CLOSE


def to_fp8(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float8_e4m3fn)


# Our node and the core's.


@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"strength": 0.4, "strength_mode": "tokens"}, {"strength": 0.4}),
        ({"strength": 0.4}, {"strength": 0.4, "strength_type": "attn_bias"}),
        ({"strength": 1.7}, {"strength": 1.7, "strength_type": "attn_bias"}),
    ],
)
def test_our_node_writes_what_the_cores_style_node_writes(host: Host, source: str, ours: dict, theirs: dict) -> None:
    report = styled(host, redux(source, **ours), core_style(source, **theirs))
    assert report["text"] < CLOSE
    weighed = theirs.get("strength_type") == "attn_bias"
    assert report["masks"] == [weighed, weighed]
    assert not weighed or report["mask"] == 0


@pytest.mark.parametrize("sampler", [core_sampler, our_sampler])
def test_a_core_loaded_model_draws_the_same_from_both(host: Host, sampler: object) -> None:
    more = {
        "a": redux(strength=0.4), "b": core_style(strength=0.4, strength_type="attn_bias"), "c": redux(),
    }  # fmt: skip
    runs = {name: sampler("core", steps=3, positive=[name, 0]) for name in "abc"}
    assert drawn_apart(host, "a", "b", (runs["a"], runs["b"]), **more) < SAMPLED
    assert drawn_apart(host, "a", "c", (runs["a"], runs["c"]), **more) > 10 * SAMPLED


def test_our_model_draws_what_the_cores_draws_under_weights_and_regions(host: Host) -> None:
    more = {"a": redux(strength=0.4), "b": redux("ours", "a", "other", strength=1.5, region=["half", 0]), **half()}
    runs = tuple(our_sampler(model, steps=3, positive=["b", 0]) for model in ("load", "core"))
    assert drawn_apart(host, "b", "b", runs, **more) < SAMPLED


@pytest.mark.parametrize("kind", ["multiply", "attn_bias"])
def test_the_cores_style_node_goes_before_and_behind_ours(host: Host, kind: str) -> None:
    settings = {"strength": 0.5, "strength_type": kind}
    before = {"b": core_style(**settings), "a": redux("ours", "b", "other", strength=0.3, region=["half", 0]), **half()}
    behind = {"b": redux("ours", "text", "other", strength=0.3, region=["half", 0]),
              "a": core_style("ours", "b", **settings), **half()}  # fmt: skip
    for more in (before, behind):
        only = entry(host, **more)
        tokens = TEXT + 2 * GRID**2
        assert only == {**only, "tokens": tokens, "grid": [8, 8], "mask": [1, tokens + 64, tokens + 64], "finite": True}
        assert math.isfinite(drawn_apart(host, "a", "b", **more))
        assert drawn_apart(host, "a", "b", **more) > 10 * SAMPLED


@pytest.mark.parametrize("fit", VIEWS)
def test_the_engine_without_a_host_makes_the_same_tokens(host: Host, fit: str) -> None:
    out = node("ProbeText", text=["a", 0])
    settings = {"fit": fit, "detail": 4, "max_tokens": 10, "image": "wide", "mask": ["half", 0]}
    report = host.succeed(styling(a=redux(**settings), out=out, **half())).report()
    made = torch.tensor(report["tokens"]).view(-1, REDUX_MINI.text_width)[TEXT:]
    picture = torch.tensor(np.array(Image.open(host.base / "input" / "wide.png").convert("RGB")))[None] / 255
    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    models = host.base / "models"
    encoder = open_redux_encoder(
        models / "clip_vision" / TOWER, models / "style_models" / ADAPTER, torch.device("cpu"), torch.float32
    )
    views = vision_pixels(picture, SIGLIP_MINI.side, fit, mask, SIGLIP_MINI.patch)
    alone = encoder.encode(ReduxPicture(views=views, grid=4, tokens=10))
    assert alone.weights is not None
    wanted = alone.tokens[0, alone.weights > 0]
    assert made.shape == wanted.shape
    assert (made - wanted).abs().max() < CLOSE * wanted.std()


# Several pictures.


def test_two_in_a_row_draw_the_same_in_either_order(host: Host) -> None:
    first = {"strength": 0.4, "region": ["half", 0]}
    second = {"strength": 1.5, "detail": 3}
    more = {
        "a": redux("ours", "text", "square", **first), "b": redux("ours", "a", "other", **second),
        "c": redux("ours", "text", "other", **second), "d": redux("ours", "c", "square", **first), **half(),
    }  # fmt: skip
    assert drawn_apart(host, "b", "d", **more) < SAMPLED
    assert drawn_apart(host, "b", "c", **more) > 10 * SAMPLED


def test_each_picture_of_a_batch_is_as_with_a_node_of_its_own(host: Host) -> None:
    more = {
        "batch": node("ImageBatch", image1=["square", 0], image2=["other", 0]),
        "one": redux("ours", "text", "square", strength=0.4),
    }
    report = styled(
        host, redux("ours", "text", "batch", strength=0.4), redux("ours", "one", "other", strength=0.4), **more
    )
    assert report["text"] < CLOSE
    assert report["mask"] == 0


# What only ours does.


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"detail": 3}, 9),
        ({"max_tokens": 20}, 20),
        ({"detail": 5, "max_tokens": 7}, 7),
        ({"image": "wide", "fit": "crop"}, GRID**2),
        ({"image": "wide", "fit": "tiled"}, 2 * GRID**2),
        ({"image": "wide", "fit": "pad"}, GRID * 5),  # half of nine rows, one of them in part
        ({"strength": 0.0}, 0),
        ({"mask": ["half", 0]}, GRID * 5),
    ],
)
def test_a_picture_becomes_as_many_tokens_as_is_asked(host: Host, changes: dict, tokens: int) -> None:
    only = entry(host, redux(**changes), **half())
    assert only == {**only, "tokens": TEXT + tokens, "finite": True, "guidance": 3.0}


def test_a_region_acts_inside_it(host: Host) -> None:
    """In one step, in which it reaches the other side only through image tokens that have seen it."""
    one, two = (core_sampler("core", steps=1, positive=[name, 0]) for name in ("a", "text"))
    out = node("ProbeCompare", a=["one", 0], b=["two", 0], mask=["half", 0])
    report = host.succeed(styling(a=redux(region=["half", 0]), one=one, two=two, out=out, **half())).report()
    assert report["kept_largest"] < report["largest"] / 2


@pytest.mark.parametrize("size", [32, 128, 512])
def test_a_region_of_any_size_is_stretched_to_the_output_without_a_number_that_is_none(host: Host, size: int) -> None:
    more = {"a": redux(region=["half", 0]), "b": redux(), **half(size=size)}
    assert entry(host, **{key: value for key, value in more.items() if key != "b"})["grid"] == [size // 16] * 2
    apart = drawn_apart(host, "a", "b", **more)
    assert math.isfinite(apart)
    assert apart > 10 * SAMPLED


def test_it_acts_in_its_time(host: Host) -> None:
    report = styled(host, redux(start=0.25, end=0.75))
    times = [each["times"] for each in report["entries"]]
    tokens = [each["tokens"] for each in report["entries"]]
    assert tokens == [TEXT, TEXT + GRID**2, TEXT]
    assert times == [[0.0, pytest.approx(0.25, abs=1e-3)], pytest.approx([0.25, 0.75], abs=1e-3),
                     [pytest.approx(0.75, abs=1e-3), 1.0]]  # fmt: skip
    assert drawn_apart(host, "a", "b", a=redux(start=0.0, end=0.3), b=redux(start=0.3, end=1.0)) > 10 * SAMPLED


def test_it_stops_between_pictures_when_the_user_cancels(host: Host) -> None:
    many = node("RepeatImageBatch", image=["square", 0], amount=4096)
    with host.listening() as listener:
        prompt = styling(many=many, a=redux(image="many"), out=node("ProbeStyled", a=["a", 0]))
        prompt_id = host.queue(prompt, listener.client)
        while listener.until("progress", "execution_success", "execution_error")["type"] != "progress":
            raise AssertionError("it ended before it could be stopped")
        host.post("/interrupt", {})
    assert host.wait(prompt_id).status == "interrupted"


# What does not fit.


def failure(host: Host, last: str, **more: dict) -> str:
    outcome = host.run(styling(**more, out=node("ProbeStyled", a=[last, 0])))
    assert outcome.status == "error"
    return outcome.error


@pytest.mark.parametrize(
    ("adapter", "tower", "words"),
    [
        (ADAPTER, "real-tower.safetensors", (ADAPTER, "real-tower.safetensors is", "of your files these fit: ", TOWER)),
        ("real-redux.safetensors", TOWER, ("real-redux.safetensors", TOWER, "these fit: real-tower.safetensors")),
        (ADAPTER, "a-text-encoder.safetensors", (ADAPTER, "a-text-encoder.safetensors is", "text encoder", TOWER)),
        ("a-text-encoder.safetensors", TOWER, ("a-text-encoder.safetensors is", "a Redux adapter is needed", ADAPTER)),
    ],
)
def test_files_that_do_not_fit_are_named_when_they_are_loaded(
    host: Host, adapter: str, tower: str, words: tuple[str, ...]
) -> None:
    pair = node("FluxFoundryLoadRedux", redux=adapter, vision_tower=tower)
    message = failure(host, "a", pair=pair, a=redux("pair"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("kind", "words"), [("clip", "is no SigLIP tower"), ("narrow", "has hidden states 64 wide")])
def test_a_tower_that_redux_does_not_take_is_refused(host: Host, kind: str, words: str) -> None:
    wrong = node("ProbeStyleModels", redux="", tower="", kind=kind, text_width=192)
    message = failure(host, "a", wrong=wrong, a=redux("ours", clip_vision=["wrong", 1]))
    assert words in message
    assert f"{ADAPTER} takes those of a SigLIP tower 128 wide" in message


def test_a_style_model_of_another_text_width_is_refused(host: Host) -> None:
    wide = node("ProbeStyleModels", redux="", tower=TOWER, kind="same", text_width=64)
    message = failure(host, "a", wide=wide, a=redux("wide"))
    assert "t5.safetensors has width 192, but the STYLE_MODEL makes tokens of width 64" in message
    assert f" {ADAPTER}" in message.partition("of your files these fit:")[2]


def test_empty_masks_are_named(host: Host) -> None:
    black = {"black": node("SolidMask", value=0.0, width=64, height=64)}
    assert "the reference's mask is black" in failure(host, "a", a=redux(mask=["black", 0]), **black)
    assert "the region's mask is black" in failure(host, "a", a=redux(region=["black", 0]), **black)


def test_a_time_that_is_none_and_a_grid_that_is_too_fine_are_refused(host: Host) -> None:
    assert "starts at 0.5 and ends at 0.5" in failure(host, "a", a=redux(start=0.5, end=0.5))
    assert "give a number from 1 to 9" in failure(host, "a", a=redux(detail=12))


def test_a_text_that_grew_behind_its_mask_is_refused(host: Host) -> None:
    joined = node("ConditioningConcat", conditioning_to=["first", 0], conditioning_from=["text", 0])
    message = failure(host, "a", first=redux(strength=0.5), joined=joined, a=redux("ours", "joined"))
    assert "its attention mask is made for" in message
