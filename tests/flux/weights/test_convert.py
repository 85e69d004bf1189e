"""A model goes to any format and layout and back; what comes out is whole, or nothing comes out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux.errors import MismatchError, UserError
from flux.mini.files import MINI
from flux.models.flux1 import Flux1
from flux.ops.layers import on_meta
from flux.pipelines.library import given_files
from flux.pipelines.parts import bind_part, open_transformer
from flux.specs.flux1 import FLUX1
from flux.weights.checkpoints import formats_of
from flux.weights.convert import convert
from flux.weights.formats.written import WRITTEN
from flux.weights.sources import open_checkpoint
from tests.conftest import ROOT
from tests.oracles import flux1_to_diffusers
from tests.stored import suffix_of
from tests.tiny import write_header_only

LARGEST_ERROR = {"fp32": 0.0, "bf16": 0.0, "gguf:F32": 0.0, "gguf:BF16": 0.0, "fp16": 1e-4, "gguf:F16": 1e-4,
                 "nvfp4": 0.13, "nf4": 0.11, "gguf:Q2_K": 0.36, "gguf:Q3_K": 0.2}  # fmt: skip


def numbers(path, kind="transformer"):
    """All numbers of a part under our names, fp32."""
    bound = bind_part(Path(path), kind)
    return {name: binding.numbers(torch.float32) for name, binding in bound.bindings.items()}


@pytest.fixture(scope="module")
def shipped():
    return numbers(MINI.transformer)


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_format_keeps_the_model(tmp_path, shipped, kind):
    target = tmp_path / f"mini{suffix_of(kind)}"
    done = convert(MINI.transformer, target, kind)
    found = numbers(target)
    assert found.keys() == shipped.keys()
    difference = sum((found[name] - own).square().sum() for name, own in shipped.items())
    norm = sum(own.square().sum() for own in shipped.values())
    assert (difference / norm).sqrt() <= LARGEST_ERROR.get(kind, 0.11)
    assert done.outcome.nbytes == target.stat().st_size
    assert sum(done.outcome.formats.values()) == sum(own.numel() for own in shipped.values())
    assert [given.found.spec.name for given in given_files([target])] == ["flux1-mini"]


@pytest.mark.parametrize("kind", ["fp8", "mxfp8", "nvfp4", "int8-row", "nf4", "gguf:Q8_0", "gguf:Q4_K"])
def test_what_is_converted_again_to_the_same_format_stays_the_same(tmp_path, kind):
    """An encoder of a format reproduces what it decoded to: nothing is lost by a second round."""
    suffix = suffix_of(kind)
    convert(MINI.transformer, tmp_path / f"once{suffix}", kind)
    convert(tmp_path / f"once{suffix}", tmp_path / f"twice{suffix}", kind)
    once, twice = numbers(tmp_path / f"once{suffix}"), numbers(tmp_path / f"twice{suffix}")
    for name, own in once.items():
        assert (twice[name] - own).norm() <= 0.02 * own.norm(), name


@pytest.mark.parametrize(("path", "kind"), [(MINI.transformer, "transformer"), (MINI.autoencoder, "autoencoder")])
def test_to_diffusers_and_back_gives_the_same_bits(tmp_path, path, kind):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert(path, there, "diffusers")
    convert(there, back, "bfl")
    before, after = load_file(path), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert before.keys() != load_file(there).keys()
    found = numbers(there, kind)
    assert all(torch.equal(found[name], own) for name, own in numbers(path, kind).items())


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("kind", ["fp8", "int8-row", "nvfp4", "nf4", "gguf:Q8_0", "gguf:Q4_K"])
def test_a_layout_alone_keeps_what_its_readers_know_and_makes_plain_numbers_of_the_rest(tmp_path, kind, layout):
    one, other = tmp_path / f"a{suffix_of(kind)}", tmp_path / "b.safetensors"
    convert(MINI.transformer, one, kind)
    convert(one, other, layout)
    is_kept = not kind.startswith("gguf") and (layout == "bfl" or kind == "nf4")
    found = next(iter(formats_of(open_checkpoint(other))))
    assert found == (WRITTEN[kind].row.name if is_kept else "BF16")
    before, after = numbers(one), numbers(other)
    for name, own in before.items():
        assert (after[name] - own).norm() <= 0.004 * own.norm(), name  # bf16's rounding at most


@pytest.mark.parametrize("to", ["fp8,diffusers", "diffusers,int8", "nvfp4,diffusers"])
def test_what_diffusers_does_not_read_is_not_written_in_its_layout(tmp_path, to):
    with pytest.raises(
        UserError, match="diffusers does not read .* files; with its layout choose one of fp32, bf16, fp16"
    ):
        convert(MINI.transformer, tmp_path / "x.safetensors", to)


@pytest.mark.parametrize(("word", "name"), [("Q4_K_M", None), ("gguf:q4_k_m", "Q4_K"), ("FP8", "fp8_e4m3fn scaled")])
def test_formats_go_by_the_names_that_people_write(tmp_path, word, name):
    if name is None:
        with pytest.raises(UserError, match="there is no format 'Q4_K_M'"):
            convert(MINI.transformer, tmp_path / "x.gguf", word)
        return
    target = tmp_path / ("x.gguf" if word.startswith("gguf") else "x.sft")
    convert(MINI.transformer, target, word)
    assert next(iter(formats_of(open_checkpoint(target)))) == name


def test_what_is_not_packed_keeps_its_own_plain_type(tmp_path):
    convert(MINI.transformer, tmp_path / "half.safetensors", "fp16")
    convert(tmp_path / "half.safetensors", tmp_path / "x.safetensors", "fp8")
    assert open_checkpoint(tmp_path / "x.safetensors")["img_in.weight"].format.name == "F16"


def test_an_autoencoder_is_not_packed(tmp_path):
    with pytest.raises(MismatchError, match=r"ae\.safetensors is .*, whose convolutions no format packs; choose bf16"):
        convert(MINI.autoencoder, tmp_path / "x.safetensors", "fp8")


def small_listing():
    """FLUX.1 [dev] with one block of each kind and width 256: another size, whose variant only its name tells."""
    with on_meta():
        module = Flux1(replace(FLUX1["flux1-dev"], hidden=256, heads=2, double_blocks=1, single_blocks=1))
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_a_variant_that_only_the_name_tells_is_written_down(tmp_path):
    path = write_header_only(tmp_path / "my-kontext.safetensors", small_listing())
    (given,) = given_files([path])
    assert given.found.spec.title.startswith("FLUX.1 Kontext")
    convert(path, tmp_path / "mine.safetensors", "bf16")
    (given,) = given_files([tmp_path / "mine.safetensors"])
    assert given.found.spec.title.startswith("FLUX.1 Kontext")


@pytest.mark.parametrize("to", ["diffusers", "fp32,diffusers"])
def test_diffusers_opens_the_folders_that_are_written_for_it(tmp_path, to):
    convert(MINI.transformer, tmp_path / "transformer", to)
    convert(MINI.autoencoder, tmp_path / "vae", to)
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    bound = bind_part(MINI.transformer, "transformer")
    ours = Flux1(bound.recognised.spec)
    ours.load_state_dict({name: binding.numbers(torch.float32) for name, binding in bound.bindings.items()})
    expected = flux1_to_diffusers(ours.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    own = numbers(MINI.autoencoder, "autoencoder")
    assert torch.equal(vae.decoder.conv_in.weight, own["decoder.conv_in.weight"])
    assert vae.config.scaling_factor == 0.3611


def test_encoders_are_not_written_as_folders(tmp_path):
    with pytest.raises(MismatchError, match="is not written as a folder here; name a .safetensors file"):
        convert(MINI.t5, tmp_path / "t5", "diffusers")
    assert os.listdir(tmp_path) == []


def test_t5_goes_to_gguf_under_llama_cpps_names(tmp_path):
    convert(MINI.t5, tmp_path / "t5.gguf", "gguf:Q8_0")
    opened = open_checkpoint(tmp_path / "t5.gguf")
    assert opened["enc.blk.0.attn_q.weight"].format.name == "Q8_0"
    assert opened.metadata["general.architecture"] == "t5encoder"
    before, after = (numbers(p, "t5") for p in (MINI.t5, tmp_path / "t5.gguf"))
    assert all((after[name] - own).norm() < 0.01 * own.norm() for name, own in before.items())


def test_norms_biases_and_embedders_stay_in_16_bits(tmp_path):
    convert(MINI.transformer, tmp_path / "x.safetensors", "fp8")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    assert opened["img_in.weight"].format.name == "BF16"
    assert opened["double_blocks.0.img_attn.norm.key_norm.scale"].format.name == "BF16"
    assert opened["double_blocks.0.img_attn.qkv.weight"].format.name == "fp8_e4m3fn scaled"


def test_a_packed_file_says_its_formats_as_comfyui_reads_them(tmp_path):
    convert(MINI.transformer, tmp_path / "x.safetensors", "fp8")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        text = bytes(file.get_tensor("double_blocks.0.img_attn.qkv.comfy_quant").tolist())
    assert text == b'{"format": "float8_e4m3fn"}'


def test_the_variant_that_the_user_names_is_written_down(tmp_path):
    shapes = load_file(MINI.transformer)
    save_file(shapes, tmp_path / "x.safetensors", metadata={"modelspec.title": "other", "author": "somebody"})
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "bf16", variant="flux1-mini")
    assert open_checkpoint(tmp_path / "y.safetensors").metadata["modelspec.title"] == "Foundry Mini"
    assert open_checkpoint(tmp_path / "y.safetensors").metadata["author"] == "somebody"


def test_progress_is_told_tensor_by_tensor_and_can_stop_it(tmp_path):
    told = []
    convert(MINI.transformer, tmp_path / "a.safetensors", "fp8", watch=lambda *event: told.append(event))
    total = told[-1][1]
    assert [event[0] for event in told] == list(range(total + 1))

    def stop(done, *_):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(MINI.transformer, tmp_path / "b.safetensors", "fp8", watch=stop)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("target", "to", "words"),
    [
        ("x.safetensors", "fp9", "there is no format 'fp9'; choose one of: fp32, bf16"),
        ("x.safetensors", "gguf:Q4_K", "x.safetensors will be a .gguf file"),
        ("x.gguf", "fp8", "x.gguf will be a .safetensors file"),
        ("x.gguf", "gguf:Q4_K,diffusers", "GGUF files have Black Forest Labs' names"),
        ("there.safetensors", "fp8", "there.safetensors"),
        ("nowhere/x.safetensors", "fp8", "nowhere"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path, target, to, words):
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(UserError) as caught:
        convert(MINI.transformer, tmp_path / target, to)
    assert words in str(caught.value)
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_only_what_is_known_is_converted(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        MismatchError, match="of no kind that is known here, but a FLUX transformer, autoencoder or text"
    ):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "fp8")
    with pytest.raises(MismatchError, match="GGUF is for transformers and T5, not for Foundry Mini's autoencoder"):
        convert(MINI.autoencoder, tmp_path / "y.gguf", "gguf:Q8_0")


def test_numbers_that_a_format_cannot_hold_are_named(tmp_path):
    tensors = load_file(MINI.transformer)
    tensors["img_in.bias"][0] = 1e30
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"tensor img_in\.bias cannot be stored as fp16: .*ends at 65504"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "fp16")


def test_one_part_of_an_all_in_one_file_is_taken_out(tmp_path):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(MINI.transformer).items()}
    whole |= {f"vae.{name}": tensor for name, tensor in load_file(MINI.autoencoder).items()}
    whole |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in load_file(MINI.clip).items()}
    whole |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in load_file(MINI.t5).items()}
    save_file(whole, tmp_path / "all.safetensors")
    convert(tmp_path / "all.safetensors", tmp_path / "t.safetensors", "bf16")
    convert(tmp_path / "all.safetensors", tmp_path / "a.safetensors", "fp16", part="autoencoder")
    assert load_file(tmp_path / "t.safetensors").keys() == load_file(MINI.transformer).keys()
    before, after = load_file(MINI.autoencoder), load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened = open_transformer(tmp_path / "all.safetensors", torch.device("cpu"))
    assert opened.spec.name == "flux1-mini"


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4", "nf4", "gguf:Q4_K"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
def test_peak_memory_is_at_most_three_of_the_largest_tensor(tmp_path, kind):
    """Anonymous memory, watched while FLUX.1's largest matrices are written, under glibc's own settings."""
    code = PEAK.format(folder=str(tmp_path), kind=kind, suffix=suffix_of(kind))
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    quiet["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=quiet)
    growth, largest = map(int, done.stdout.split())
    assert growth < 3 * largest


PEAK = """
import threading, time
from pathlib import Path
from flux.weights import storing
from flux.weights.binding import Binding
from flux.weights.convert import StoredItem
from flux.weights.formats.written import WRITTEN
from flux.weights.renames import LAYOUTS, Piece, Recipe
from flux.weights.sources import open_checkpoint
from tests.tiny import write_header_only

folder, shape = Path({folder!r}), (21504, 3072)
names = [f"single_blocks.{{n}}.linear1.weight" for n in range(2)]
opened = open_checkpoint(write_header_only(folder / "big.safetensors", dict.fromkeys(names, shape)))
items = {{name: StoredItem(Binding(shape, Recipe((Piece(name),)), {{name: opened[name]}})) for name in names}}
stores = storing.Stores(
    part="transformer", layout=LAYOUTS["flux1-bfl"], written=WRITTEN[{kind!r}], metadata={{}}, title="x"
)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = peak = anonymous()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
storing.store(folder / "out{suffix}", items, stores)
running = False
thread.join()
print(peak - before, shape[0] * shape[1] * 2)
"""
