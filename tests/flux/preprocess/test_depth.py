"""Depth is what transformers' models give, larger where nearer, and only whole depth models' folders are opened."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.errors import FileError, MissingFileError, NumericError, UserError
from flux.preprocess.depth import DepthEstimator, normalise_depth, open_depth
from tests.conftest import ROOT

SIDE, PATCH = 56, 14


def save_model(folder, kind: str = "relative"):
    """A tiny Depth Anything of random weights whose maps vary."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("backbone"):
                parameter.mul_(8)
        model.head.conv3.bias.fill_(0.5)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": PATCH,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("relative"))


@pytest.fixture(scope="module")
def metric_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("metric"), "metric")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of the same files, to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def pictures(batch: int = 1, height: int = 60, width: int = 90) -> torch.Tensor:
    levels = torch.randint(0, 256, (batch, height // 10, width // 10, 3), generator=torch.Generator().manual_seed(0))
    return levels.float().repeat_interleave(10, 1).repeat_interleave(10, 2) / 255


def predicted(folder, image: torch.Tensor) -> torch.Tensor:
    """The model's own map (1, h, w) of one picture, as transformers' documentation says to get it."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForDepthEstimation.from_pretrained(folder).eval()
    array = (image[0] * 255).round().byte().numpy()
    with torch.no_grad():
        return model(**processor(images=array, return_tensors="pt")).predicted_depth


def resized(depth: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(depth[:, None], (height, width), mode="bicubic", antialias=True)[:, 0]


def test_depth_is_the_models_own_map_at_the_pictures_size(folder):
    image = pictures()
    depth = open_depth(folder).estimate(image)
    own = predicted(folder, image)
    assert own.std() > 1e-3
    assert depth.shape == (1, 60, 90)
    torch.testing.assert_close(depth, resized(own, 60, 90), rtol=1e-5, atol=1e-6)


def test_a_batch_is_estimated_as_each_picture_is_alone(folder):
    estimator, image = open_depth(folder), pictures(3)
    alone = torch.cat([estimator.estimate(image[index : index + 1]) for index in range(3)])
    assert torch.equal(estimator.estimate(image), alone)
    assert not torch.equal(alone[0], alone[1])


def test_distances_are_turned_into_nearness(metric_folder):
    image = pictures()
    metres = predicted(metric_folder, image)
    assert metres.std() > 1e-3
    depth = open_depth(metric_folder).estimate(image)
    torch.testing.assert_close(depth, resized(1 / metres.clamp(min=0.1), 60, 90), rtol=1e-5, atol=1e-6)


def test_models_whose_config_does_not_say_it_give_distances_too(copy):
    assert not open_depth(copy).gives_distance
    transformers = pytest.importorskip("transformers")
    model = transformers.GLPNForDepthEstimation(
        transformers.GLPNConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8,
                                num_attention_heads=[1, 1, 1, 1])
    )  # fmt: skip
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy)
    assert open_depth(copy).gives_distance


class FixedModel:
    """Gives one map, whatever it sees."""

    device = torch.device("cpu")

    def __init__(self, depth: torch.Tensor) -> None:
        self.predicted_depth = depth

    def __call__(self, pixels: torch.Tensor) -> FixedModel:
        return self


def as_pixels(images: torch.Tensor, return_tensors: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": images.float()}


def test_a_distance_of_nothing_stays_finite_and_nearest():
    depth = torch.tensor([[[0.0, 0.05], [1.0, 10.0]]])
    near = DepthEstimator(FixedModel(depth), as_pixels, gives_distance=True).estimate(torch.rand(1, 2, 2, 3))
    torch.testing.assert_close(near, torch.tensor([[[10.0, 10.0], [1.0, 0.1]]]))


def test_numbers_that_are_not_finite_are_refused():
    broken = DepthEstimator(FixedModel(torch.full((1, 2, 2), torch.nan)), as_pixels, gives_distance=False)
    with pytest.raises(NumericError, match="not finite"):
        broken.estimate(torch.rand(1, 2, 2, 3))


def test_weights_stored_in_half_precision_run_in_fp32(copy):
    halves = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(halves, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    estimator = open_depth(copy)
    assert {parameter.dtype for parameter in estimator.model.parameters()} == {torch.float32}
    assert estimator.estimate(pictures()).isfinite().all()


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["config.json"], r"has no config\.json; a depth model's folder needs"),
        (["preprocessor_config.json"], r"has no preprocessor_config\.json; .*/Depth-Anything"),
        (["config.json", "model.safetensors"], r"has no config\.json and no model\.safetensors;"),
    ],
)
def test_a_folder_without_a_models_files_is_told_which(copy, gone, words):
    for name in gone:
        (copy / name).unlink()
    with pytest.raises(MissingFileError, match=words):
        open_depth(copy)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="folder .*nowhere was not found; download"):
        open_depth(tmp_path / "nowhere")


def test_weights_that_are_a_pickle_are_not_read(copy):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"has no model\.safetensors"):
        open_depth(copy)


def rewritten(copy, **changes):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda copy: (copy / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda copy: (copy / "config.json").write_text("[]"), "is not a model's config"),
        (lambda copy: rewritten(copy, model_type="bert"), "cannot be opened as a depth model"),
        (lambda copy: rewritten(copy, model_type="nothing-known"), "cannot be opened as a depth model"),
        (lambda copy: rewritten(copy, fusion_hidden_size="wide"), "cannot be opened as a depth model"),
        (
            lambda copy: rewritten(copy, auto_map={"AutoModelForDepthEstimation": "run.Me"}, model_type="own"),
            "opened as",
        ),
        (lambda copy: (copy / "model.safetensors").write_bytes(b"broken"), "cannot be opened as a depth model"),
        (
            lambda copy: rewritten(copy, backbone="facebook/dinov2-small", backbone_config=None),
            r"only names its backbone \(facebook/dinov2-small\), which would have to be downloaded",
        ),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_in_a_sentence(copy, damage, words):
    damage(copy)
    with pytest.raises(FileError, match=words):
        open_depth(copy)


def test_a_model_with_missing_tensors_is_refused_instead_of_guessed(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["head.conv2.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"1 of the model's tensors are missing, such as head\.conv2\.weight"):
        open_depth(copy)


def test_without_transformers_the_way_to_install_it_is_told(copy, monkeypatch):
    def refuse(name, *_):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UserError, match="-m pip install transformers`, or give a depth map"):
        open_depth(copy)


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, flux.preprocess.depth; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_nothing_is_looked_up_outside_the_folder(folder, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_depth(folder).estimate(pictures()).shape == (1, 60, 90)


def raw_depth() -> torch.Tensor:
    return torch.tensor([[[1.0, 3.0], [5.0, 9.0]], [[100.0, 400.0], [300.0, 200.0]]])


def test_minmax_brings_each_picture_to_the_whole_range():
    wanted = torch.tensor([[[0, 0.25], [0.5, 1]], [[0, 1], [2 / 3, 1 / 3]]])
    torch.testing.assert_close(normalise_depth(raw_depth()), wanted[..., None].expand(-1, -1, -1, 3))


def test_bfl_shows_the_autoencoder_raw_over_127_and_a_half_less_one_unclamped():
    shown = normalise_depth(raw_depth(), "bfl") * 2 - 1
    torch.testing.assert_close(shown[..., 1], raw_depth() / 127.5 - 1)
    assert shown.max() > 1


def test_none_leaves_the_numbers():
    assert torch.equal(normalise_depth(raw_depth(), "none")[..., 2], raw_depth())


@pytest.mark.parametrize("how", ["minmax", "bfl", "none"])
def test_turning_over_swaps_near_and_far_within_each_pictures_range(how):
    plain, turned = (normalise_depth(raw_depth(), how, invert=invert)[..., 0] for invert in (False, True))
    low, high = plain.amin((1, 2), keepdim=True), plain.amax((1, 2), keepdim=True)
    torch.testing.assert_close(turned, low + high - plain)
    assert not torch.equal(turned, plain)


@pytest.mark.parametrize("invert", [False, True])
def test_a_picture_of_one_depth_becomes_black(invert):
    assert torch.equal(normalise_depth(torch.full((1, 3, 4), 7.0), invert=invert), torch.zeros(1, 3, 4, 3))


def test_an_unknown_normalisation_lists_those_that_there_are():
    with pytest.raises(UserError, match="'midas'; choose one of minmax, bfl, none"):
        normalise_depth(raw_depth(), "midas")
