"""Nodes that work on pictures, with a fake of the host and of its autoencoder: what they give, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_host import Vae
from torch import Tensor

SMALL = {"side": 64, "context": 1.5, "min_context": 8, "grow": 0, "blur": 0.0, "fill_holes": False, "invert": False,
         "multiple": 16}  # fmt: skip
SIDES = {"left": 0, "right": 0, "top": 0, "bottom": 0}
CANVAS = {**SIDES, "aspect": "off", "anchor": "center", "feather": 0, "fill": "grey"}
FILL = {"strength": 1.0, "start": 0.0, "end": 1.0, "rounding": "soft", "noise_mask": False}
CONTROL = {"kind": "image", "low": 50.0, "high": 200.0, "automatic": False, "fit": "stretch", "strength": 1.0,
           "start": 0.0, "end": 1.0, "slot": 1}  # fmt: skip
IMAGE, MASK, CONTROLS = "concat_latent_image", "concat_mask", "fluxfoundry_controls"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def disc(height: int, width: int, radius: int = 9) -> Tensor:
    """A mask (1, H, W) that holds a disc."""
    rows, columns = torch.arange(height)[:, None] - height // 3, torch.arange(width)[None] - width // 2
    return (torch.hypot(rows.float(), columns.float()) < radius).float()[None]


def prompt(**extra: object) -> list:
    return [[numbers(1, 4, 8), {"guidance": 3.0, **extra}]]


def weights(conditioning: list) -> list[float]:
    return [extra.get("strength", 1.0) for _, extra in conditioning]


# Cutting out, growing and putting back.


def test_what_is_written_out_for_a_quick_start_is_the_engines(load: Callable[[str], ModuleType]) -> None:
    editing, control, bridge = load("nodes.editing"), load("nodes.control"), load("nodes.bridge.control")
    masks, inpaint, outpaint, canny = (
        load(f"flux.{name}") for name in ("editing.masks", "editing.inpaint", "editing.outpaint", "preprocess.canny")
    )
    assert (editing.MAX_GROW, editing.MAX_BLUR) == (masks.MAX_GROW, masks.MAX_BLUR)
    assert (editing.MAX_CONTEXT, editing.ANCHORS, editing.FILLS) == (
        inpaint.MAX_CONTEXT, outpaint.ANCHORS, outpaint.FILLS,
    )  # fmt: skip
    assert (control.LOW, control.HIGH, control.MAX_THRESHOLD) == (canny.LOW, canny.HIGH, canny.MAX_THRESHOLD)
    assert control.KINDS == bridge.KINDS


@pytest.mark.parametrize("side", [0, 64])
def test_a_stitched_picture_is_the_original_to_the_bit_where_the_mask_is_0(run: Callable, side: int) -> None:
    image, mask = numbers(2, 90, 117, 3), disc(90, 117)
    crop, hole, ticket = run("editing", "InpaintCrop", image=image, mask=mask, **{**SMALL, "side": side, "blur": 3.0})
    assert all(length % 16 == 0 for length in crop.shape[1:3])
    assert hole.shape == crop.shape[:3]
    [whole] = run("editing", "Stitch", image=1 - crop, crop=ticket, colour_match=1.0)
    kept = (mask == 0).expand(2, -1, -1)
    assert torch.equal(whole[kept], image[kept])
    assert not torch.allclose(whole[~kept], image[~kept])


def test_the_crop_is_shown_with_what_is_painted_in_red(load: Callable[[str], ModuleType]) -> None:
    node = load("nodes.editing").InpaintCrop
    out = node.execute(image=torch.zeros(1, 64, 64, 3), mask=disc(64, 64), **SMALL)
    assert torch.allclose(out.ui["images"], out.result[1][..., None] * torch.tensor([0.5, 0.0, 0.0]))
    assert float(out.ui["images"].max()) == 0.5


def test_transparent_places_are_laid_on_white_and_that_is_said(run: Callable, said: Callable[[], str]) -> None:
    image = torch.cat((torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64, 1)), dim=-1)
    run("editing", "InpaintCrop", image=image, mask=disc(64, 64), **SMALL)
    assert "transparent" not in said()
    image[:, :8, :8, 3] = 0
    _, _, ticket = run("editing", "InpaintCrop", image=image, mask=disc(64, 64), **SMALL)
    assert "they are laid on white" in said()
    assert bool((ticket.original[:, :8, :8] == 1).all())


def test_a_picture_grows_to_the_pixel_on_a_canvas_of_the_grid(run: Callable) -> None:
    image = numbers(1, 50, 70, 3)
    settings = {**CANVAS, "left": 11, "bottom": 30, "feather": 6}
    canvas, mask, ticket = run("editing", "Outpaint", image=image, **settings)
    assert canvas.shape == (1, 80, 96, 3)
    assert mask.shape == (1, 80, 96)
    [whole] = run("editing", "Stitch", image=numbers(1, 80, 96, 3, seed=1), crop=ticket, colour_match=1.0)
    assert whole.shape == (1, 80, 81, 3)
    assert torch.equal(whole[:, :50, 11:], image)


def test_an_aspect_outweighs_sides_and_the_anchor_says_where_the_picture_stands(run: Callable) -> None:
    image = numbers(1, 48, 48, 3)
    settings = {**CANVAS, "left": 64, "top": 64, "aspect": "16:9", "anchor": "left"}
    canvas, _, ticket = run("editing", "Outpaint", image=image, **settings)
    assert canvas.shape == (1, 48, 96, 3)
    [whole] = run("editing", "Stitch", image=canvas, crop=ticket, colour_match=0.0)
    assert whole.shape == (1, 48, 85, 3)
    assert torch.equal(whole[:, :, :48], image)


def test_a_shift_of_colours_around_a_grown_picture_is_taken_out(run: Callable) -> None:
    image = 0.3 + 0.2 * numbers(1, 64, 64, 3)
    canvas, _, ticket = run("editing", "Outpaint", image=image, **{**CANVAS, "right": 32, "fill": "edge"})
    shifted = canvas + 0.1
    plain, matched = (
        run("editing", "Stitch", image=shifted, crop=ticket, colour_match=share)[0] for share in (0.0, 1.0)
    )
    new = (slice(None), slice(None), slice(64, None))
    assert float((plain[new] - canvas[new]).abs().mean()) > 0.09
    assert float((matched[new] - canvas[new]).abs().mean()) < 0.02


def test_a_stitch_refuses_what_is_no_crop_or_not_of_its_size(load: Callable[[str], ModuleType], run: Callable) -> None:
    errors = load("flux.errors")
    with pytest.raises(errors.MismatchError, match="the crop is a str; connect the crop output of FLUX Inpaint Crop"):
        run("editing", "Stitch", image=numbers(1, 64, 64, 3), crop="crop", colour_match=0.0)
    _, _, ticket = run("editing", "Outpaint", image=numbers(1, 64, 64, 3), **{**CANVAS, "left": 16})
    with pytest.raises(errors.UserError, match="the painted picture is 64x64 and the canvas 80x64"):
        run("editing", "Stitch", image=numbers(1, 64, 64, 3), crop=ticket, colour_match=0.5)


@pytest.mark.parametrize(
    ("settings", "words"), [({}, "no side is to grow"), ({"aspect": "1:1"}, "has the aspect 1:1 as it is")]
)
def test_growing_by_nothing_is_refused(
    load: Callable[[str], ModuleType], run: Callable, settings: dict, words: str
) -> None:
    with pytest.raises(load("flux.errors").UserError, match=words):
        run("editing", "Outpaint", image=numbers(1, 48, 48, 3), **{**CANVAS, **settings})


def test_a_canvas_above_what_the_model_was_trained_on_is_said(run: Callable, said: Callable[[], str]) -> None:
    run("editing", "Outpaint", image=torch.zeros(1, 1024, 1024, 3), **{**CANVAS, "right": 1024})
    assert "megapixels" not in said()
    run("editing", "Outpaint", image=torch.zeros(1, 1024, 1024, 3), **{**CANVAS, "right": 1040})
    assert "2064x1024 are 2.0 megapixels" in said()


# A hole for Fill.


@pytest.mark.parametrize(("rounding", "hidden", "shown"), [("soft", 0.6, 0.6), ("hidden", 1, 0.6), ("binary", 1, 1)])
def test_a_soft_mask_is_taken_as_asked(run: Callable, rounding: str, hidden: float, shown: float) -> None:
    image = numbers(1, 32, 48, 3)
    mask = torch.zeros(1, 32, 48)
    mask[:, :16, 8:24] = 0.6
    positive, negative, latent = run(
        "filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=mask, **{**FILL, "rounding": rounding}
    )
    [[_, extra]] = positive
    inside = (mask > 0)[..., None]
    seen = torch.where(inside, image * (1 - hidden) + 0.5 * hidden, image)
    assert torch.allclose(extra[IMAGE], Vae().encode(seen))
    assert torch.equal(extra[MASK], torch.where(mask > 0, shown, 0.0)[:, None])
    assert torch.equal(latent["samples"], Vae().encode(image))
    assert "noise_mask" not in latent
    assert negative is positive


def test_a_mask_of_which_rounding_leaves_nothing_is_told_of(run: Callable, said: Callable[[], str]) -> None:
    faint = {"image": numbers(1, 32, 32, 3), "mask": 0.4 * disc(32, 32)}
    for rounding, told in (("soft", False), ("binary", True)):
        run("filling", "Fill", positive=prompt(), vae=Vae(), **faint, **{**FILL, "rounding": rounding})
        assert ("rounding hides nothing" in said()) == told


def test_a_hole_that_acts_in_part_and_for_a_time_is_entries_beside_those_without(run: Callable) -> None:
    before, other = prompt(), prompt(end_percent=0.9)
    settings = {**FILL, "strength": 0.25, "start": 0.5, "noise_mask": True}
    positive, negative, latent = run(
        "filling", "Fill", positive=before, negative=other, vae=Vae(), image=numbers(1, 32, 32, 3), mask=disc(32, 32),
        **settings,
    )  # fmt: skip
    empty = Vae().encode(torch.full((1, 32, 32, 3), 0.5))
    for conditioning in (positive, negative):
        assert [torch.equal(extra[IMAGE], empty) for _, extra in conditioning] == [True, False, True]
        assert [bool((extra[MASK] == 1).all()) for _, extra in conditioning] == [True, False, True]
        assert weights(conditioning) == [1.0, 0.25, 0.75]
    assert negative[1][1]["end_percent"] == 0.9
    assert latent["noise_mask"].shape == (1, 1, 32, 32)
    assert [set(extra) for _, extra in (*before, *other)] == [{"guidance"}, {"guidance", "end_percent"}]


def test_sides_that_do_not_divide_by_8_are_cut_evenly_and_that_is_said(run: Callable, said: Callable[[], str]) -> None:
    image, mask = numbers(1, 37, 40, 3), disc(37, 40)
    positive, _, latent = run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=mask, **FILL)
    assert torch.equal(latent["samples"], Vae().encode(image[:, 2:34]))
    assert torch.equal(positive[0][1][MASK], mask[:, None, 2:34])
    assert "(40x37) do not divide by 8: the 40x32 in its middle are taken" in said()


def test_a_batch_may_have_one_mask_or_one_each(load: Callable[[str], ModuleType], run: Callable) -> None:
    two = torch.cat((disc(32, 32), disc(32, 32, 4)))
    for pictures, masks in ((1, two), (2, two), (2, disc(32, 32))):
        positive, _, latent = run(
            "filling", "Fill", positive=prompt(), vae=Vae(), image=numbers(pictures, 32, 32, 3), mask=masks, **FILL
        )
        assert len(positive[0][1][IMAGE]) == len(positive[0][1][MASK]) == len(latent["samples"]) == 2
    with pytest.raises(load("flux.errors").UserError, match="there are 3 pictures and 2 masks"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=numbers(3, 32, 32, 3), mask=two, **FILL)


def test_a_picture_is_seen_in_its_region_and_hidden_elsewhere(run: Callable, load: Callable) -> None:
    image, region = numbers(1, 32, 32, 3), torch.zeros(1, 32, 32)
    region[:, :, 16:] = 1
    mask = disc(32, 32)
    positive, *_ = run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=mask, **FILL, region=region)
    for (_, extra), wanted in zip(positive, (region, 1 - region), strict=True):
        assert torch.equal(extra["mask"], wanted)
    seen, hidden = (extra for _, extra in positive)
    assert bool((seen[MASK] < 1).any())
    assert bool((hidden[MASK] == 1).all())
    with pytest.raises(load("flux.errors").UserError, match="the picture would be seen nowhere"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=mask, **FILL, region=region * 0)


def test_only_a_mask_that_looks_inverted_is_hinted_at(run: Callable, said: Callable[[], str]) -> None:
    canvas, mask, _ = run("editing", "Outpaint", image=numbers(1, 32, 32, 3), **{**CANVAS, **dict.fromkeys(SIDES, 32)})
    edged, *_ = run(
        "editing", "Outpaint", image=canvas[:, 32:64, 32:64], **{**CANVAS, **dict.fromkeys(SIDES, 32), "fill": "edge"}
    )
    for outpainted in (canvas, edged):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=outpainted, mask=mask, **FILL)
        assert "invert" not in said()
    run("filling", "Fill", positive=prompt(), vae=Vae(), image=canvas, mask=1 - disc(96, 96), **FILL)
    assert "nearly all around what it keeps" in said()
    run("filling", "Fill", positive=prompt(), vae=Vae(), image=numbers(1, 96, 96, 3), mask=mask, **FILL)
    assert "nearly all around what it keeps" in said()


def test_a_full_mask_and_one_of_another_size_are_told_of(run: Callable, said: Callable[[], str]) -> None:
    image = numbers(1, 32, 48, 3)
    run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=torch.ones(1, 32, 48), **FILL)
    told = said()
    assert "the mask covers the whole picture: all of it is repainted and nothing kept" in told
    assert "of another size" not in told
    _, _, latent, *_ = run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=disc(64, 64), **FILL)
    assert "the mask (64x64) is of another size than the picture (48x32): it is resized and stretched" in said()
    assert latent["samples"].shape[-2:] == (4, 6)


def test_what_fill_cannot_take_is_refused(load: Callable[[str], ModuleType], run: Callable) -> None:
    errors = load("flux.errors")
    image, mask = numbers(1, 32, 32, 3), disc(32, 32)
    with pytest.raises(errors.UserError, match="the mask is empty"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=torch.zeros(1, 64, 64), **FILL)
    with pytest.raises(errors.MismatchError, match="FLUX.1's have 16 channels"):
        run("filling", "Fill", positive=prompt(), vae=Vae(4), image=image, mask=mask, **FILL)
    with pytest.raises(errors.UserError, match="it starts at 0.5 and ends at 0.5"):
        run(
            "filling",
            "Fill",
            positive=prompt(),
            vae=Vae(),
            image=image,
            mask=mask,
            **{**FILL, "start": 0.5, "end": 0.5},
        )
    with pytest.raises(errors.UserError, match="the strength is 3"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=image, mask=mask, **{**FILL, "strength": 3.0})
    with pytest.raises(errors.UserError, match="give one of at least 8x8 pixels"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=image[:, :4], mask=mask, **FILL)
    with pytest.raises(errors.NumericError, match="not finite"):
        run("filling", "Fill", positive=prompt(), vae=Vae(), image=image / 0, mask=mask, **FILL)


# Controls.


def test_a_control_picture_lies_under_the_hosts_key_and_further_ones_under_ours(run: Callable) -> None:
    one, two = numbers(1, 32, 48, 3), numbers(1, 32, 48, 3, seed=1)
    first, _, latent, seen = run("control", "Control", positive=prompt(), vae=Vae(), image=one, **CONTROL)
    assert torch.equal(seen, one)
    assert latent["samples"].shape == (1, 16, 4, 6)
    assert not latent["samples"].any()
    both, *_ = run("control", "Control", positive=first, vae=Vae(), image=two, **{**CONTROL, "slot": 2})
    [[_, extra]] = both
    assert torch.equal(extra[IMAGE], Vae().encode(one))
    assert set(extra[CONTROLS]) == {2}
    assert torch.equal(extra[CONTROLS][2], Vae().encode(two))
    assert CONTROLS not in first[0][1]


def test_a_hole_and_a_control_come_to_the_same_in_any_order(run: Callable) -> None:
    image, mask, other = numbers(1, 32, 32, 3), disc(32, 32), numbers(1, 32, 32, 3, seed=1)

    def hole(conditioning: list) -> list:
        return run("filling", "Fill", positive=conditioning, vae=Vae(), image=image, mask=mask, **FILL)[0]

    def control(conditioning: list) -> list:
        return run("control", "Control", positive=conditioning, vae=Vae(), image=other, **CONTROL)[0]

    for made in (hole(control(prompt())), control(hole(prompt()))):
        [[_, extra]] = made
        assert torch.allclose(extra[IMAGE], Vae().encode(image * (1 - mask[..., None]) + 0.5 * mask[..., None]))
        assert torch.equal(extra[CONTROLS][1], Vae().encode(other))


def test_without_a_part_of_a_hole_its_control_still_acts(run: Callable) -> None:
    control, *_ = run("control", "Control", positive=prompt(), vae=Vae(), image=numbers(1, 32, 32, 3), **CONTROL)
    made, *_ = run(
        "filling", "Fill", positive=control, vae=Vae(), image=numbers(1, 32, 32, 3), mask=disc(32, 32),
        **{**FILL, "strength": 0.5},
    )  # fmt: skip
    assert [(bool((extra[MASK] == 1).all()), set(extra[CONTROLS])) for _, extra in made] == [(False, {1}), (True, {1})]


def test_a_latent_gives_the_size_and_goes_through_as_it_is(run: Callable, said: Callable[[], str]) -> None:
    for samples, more in (
        (numbers(3, 16, 8, 4), {"noise_mask": numbers(3, 1, 64, 32), "batch_index": [4, 5, 6]}),
        (torch.zeros(3, 128, 4, 2), {"downscale_ratio_spacial": 16}),
    ):
        given = {"samples": samples, **more}
        _, _, latent, seen = run(
            "control", "Control", positive=prompt(), vae=Vae(), image=numbers(1, 32, 48, 3), latent=given, **CONTROL
        )
        assert seen.shape == (1, 64, 32, 3)
        assert set(latent) == set(given)
        assert all(latent[key] is value for key, value in given.items())
    assert "has another aspect than the output (32x64): it is stretched" in said()


def test_without_a_latent_the_size_is_the_images_at_multiples_of_16(run: Callable, said: Callable[[], str]) -> None:
    *_, seen = run("control", "Control", positive=prompt(), vae=Vae(), image=numbers(1, 41, 50, 3), **CONTROL)
    assert seen.shape == (1, 48, 48, 3)
    assert "(50x41) do not divide by 16: it is brought to 48x48" in said()


def test_edges_are_found_at_the_drawn_size(load: Callable[[str], ModuleType], run: Callable) -> None:
    photo = numbers(1, 4, 4, 3).repeat_interleave(16, 1).repeat_interleave(16, 2)
    *_, seen = run(
        "control", "Control", positive=prompt(), vae=Vae(), image=photo, latent={"samples": torch.zeros(1, 16, 4, 4)},
        **{**CONTROL, "kind": "canny"},
    )  # fmt: skip
    canny, resize = load("flux.preprocess.canny"), load("flux.preprocess.control").resize
    assert torch.equal(seen, canny.canny(resize(photo, 32, 32)))
    assert 0 < float(seen.mean()) < 1
    edges = {"image": photo, "low": 0.0, "high": 0.0}
    [automatic] = run("control", "Canny", **edges, automatic=True)
    assert torch.equal(automatic, canny.automatic_canny(photo))
    [given] = run("control", "Canny", **edges, automatic=False)
    assert torch.equal(given, canny.canny(photo, 0, 0))


def test_pictures_of_another_kind_are_hinted_at(run: Callable, said: Callable[[], str]) -> None:
    ramp = torch.linspace(0, 1, 32)[None, None, :, None].expand(1, 32, 32, 3)
    lines = (ramp > 0.5).float()
    for image, kind in ((ramp, "depth"), (numbers(1, 32, 32, 3), "canny"), (lines, "image")):
        run("control", "Control", positive=prompt(), vae=Vae(), image=image, **{**CONTROL, "kind": kind})
    assert not said()
    for image, kind, words in (
        (numbers(1, 32, 32, 3), "depth", "has colours, so that it is no depth picture"),
        (lines, "canny", "if it is edges already, set kind to image"),
        (0.5 * torch.ones(1, 32, 32, 3), "canny", "no edges were found"),
    ):
        run("control", "Control", positive=prompt(), vae=Vae(), image=image, **{**CONTROL, "kind": kind})
        assert words in said()


def test_a_control_acts_in_part_for_a_time_and_in_a_region(run: Callable) -> None:
    image, region = numbers(1, 32, 32, 3), disc(32, 32)
    made, _, *_ = run(
        "control", "Control", positive=prompt(), vae=Vae(), image=image, region=region,
        **{**CONTROL, "strength": 1.5, "end": 0.5},
    )  # fmt: skip
    with_it, without, later = (extra for _, extra in made)
    assert torch.equal(with_it["mask"], 1.5 * region)
    assert torch.equal(without["mask"], 1 - 1.5 * region)
    assert [IMAGE in extra for extra in (with_it, without, later)] == [True, False, False]
    assert with_it["end_percent"] == later["start_percent"]


def test_a_second_picture_for_a_slot_is_told_of_where_both_would_act(run: Callable, said: Callable[[], str]) -> None:
    image = numbers(1, 32, 32, 3)
    for slot in (1, 2):
        early, *_ = run(
            "control", "Control", positive=prompt(), vae=Vae(), image=image, **{**CONTROL, "slot": slot, "end": 0.5}
        )
        run("control", "Control", positive=early, vae=Vae(), image=image, **{**CONTROL, "slot": slot, "start": 0.5})
        assert f"a picture for control {slot} already" not in said()
        run("control", "Control", positive=early, vae=Vae(), image=image, **{**CONTROL, "slot": slot})
        assert f"a picture for control {slot} already, which this one replaces" in said()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 300.0, "kind": "canny"}, "the low threshold .300. is above the high one"),
        ({"kind": "pose"}, "there is no control of kind 'pose'; choose one of canny, depth, image"),
        ({"region": torch.zeros(1, 32, 32)}, "the region's mask is black everywhere"),
        ({"region": torch.ones(2, 32, 32)}, "give one mask"),
        ({"vae": Vae(128)}, "FLUX.1's have 16 channels"),
        ({"strength": 2.5}, "the strength is 2.5; give a number from 0 to 2"),
        ({"strength": -0.5}, "the strength is -0.5; give a number from 0 to 2"),
        ({"start": 0.8, "end": 0.2}, "it starts at 0.8 and ends at 0.2"),
    ],
)
def test_what_a_control_cannot_take_is_refused(
    load: Callable[[str], ModuleType], run: Callable, settings: dict, words: str
) -> None:
    given = {"positive": prompt(), "vae": Vae(), "image": numbers(1, 32, 32, 3), **CONTROL, **settings}
    with pytest.raises(load("flux.errors").FluxFoundryError, match=words):
        run("control", "Control", **given)


# Depth.


@pytest.fixture
def depth_root(load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load("nodes.bridge.depth").folder_paths, "get_folder_paths", lambda key: [str(tmp_path / key)])
    return tmp_path / "depth"


def test_depth_models_are_folders_with_a_config_of_one_or_two_levels(
    load: Callable[[str], ModuleType], depth_root: Path
) -> None:
    depth, missing = load("nodes.bridge.depth"), load("flux.errors").MissingFileError
    [nothing] = depth.depth_models()
    with pytest.raises(missing, match="there is no depth model in .*depth; download depth-anything/.* IMAGE of any"):
        depth.depth_folder(nothing)
    for name in ("small", "owner/large", "a/b/too-deep"):
        (depth_root / name).mkdir(parents=True)
        (depth_root / name / "config.json").write_text("{}")
    (depth_root / "no-config").mkdir()
    assert depth.depth_models() == ["owner/large", "small"]
    assert depth.depth_folder("owner/large") == depth_root / "owner" / "large"
    for name in ("../depth/small", "no-config", ""):
        with pytest.raises(missing, match="choose one of"):
            depth.depth_folder(name)


def test_depth_is_looked_for_in_each_picture_and_normalised(
    load: Callable[[str], ModuleType], run: Callable, depth_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (depth_root / "small").mkdir(parents=True)
    (depth_root / "small" / "config.json").write_text("{}")
    looked = []

    class Estimator:
        model = torch.nn.Linear(1, 1)

        def estimate(self, picture: Tensor) -> Tensor:
            looked.append(tuple(picture.shape))
            return 10 * picture.mean(-1) + 5

    monkeypatch.setattr(load("nodes.bridge.control"), "open_depth", lambda folder: Estimator())
    image = numbers(2, 16, 16, 3)
    nodes = {"model": "small", "normalisation": "minmax"}
    [depth] = run("control", "Depth", image=image, invert=False, **nodes)
    [inverted] = run("control", "Depth", image=image, invert=True, **nodes)
    assert looked[:2] == [(1, 16, 16, 3)] * 2
    assert torch.equal(depth.amin((1, 2, 3)), torch.zeros(2))
    assert torch.equal(depth.amax((1, 2, 3)), torch.ones(2))
    assert torch.allclose(inverted, 1 - depth, atol=1e-6)
    for shown, picture in zip(depth[..., 0], image.mean(-1), strict=True):
        assert int(shown.argmax()) == int(picture.argmax())
