"""Rows applied both ways: plans that join, cut, swap and reshape, and names that stop a load."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from flux.errors import FileError
from flux.weights.renames import Packing, Piece, Recipe, Reshape, assemble
from flux.weights.renames.tables import Change, Row, Table, alternatives, native, pairs
from tests.conftest import ROOT


def rows(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = (
    *pairs({"in": "embed", "blocks.{}.out.0": "layers.{}.proj"}, ("weight", "bias")),
    Row("blocks.{}.qkv.weight", tuple(f"layers.{{}}.{x}.weight" for x in "qkv")),
    Row("blocks.{}.wide.weight", ("layers.{}.narrow.weight", "layers.{}.rest.weight"), shares=(1, 3)),
    Row("final.weight", ("last.weight",), change=Change.SWAPPED),
    Row("conv.weight", ("linear.weight",), change=Change.LINEAR),
    Row("levels.{}.block.{}.weight", ("stages.{-}.part.{}.weight",)),
    Row("words.weight", ("shared.weight",)),
    Row("words.weight", ("tokens.weight",), is_duplicate=True),
    Row(None, ("unused.weight",)),
    Row(None, ("other.*",)),
)
TABLE = Table("the toy", ROWS)
OURS = {
    "in.weight": rows(4, 2, seed=1),
    "in.bias": rows(4, seed=2),
    "blocks.0.out.0.weight": rows(4, 4, seed=3),
    "blocks.0.qkv.weight": rows(12, 4, seed=4),
    "blocks.11.qkv.weight": rows(12, 4, seed=5),
    "blocks.11.wide.weight": rows(8, 4, seed=6),
    "final.weight": rows(6, 4, seed=7),
    "conv.weight": rows(4, 3, 1, 1, seed=8),
    "words.weight": rows(9, 4, seed=9),
    **{f"levels.{n}.block.{m}.weight": rows(2, 2, seed=10 + 2 * n + m) for n in range(3) for m in range(2)},
}


def carried_out(plan, tensors):
    return {name: assemble(recipe, tensors.__getitem__) for name, recipe in plan.items()}


def foreign():
    return carried_out(TABLE.to_foreign(OURS), OURS)


def assert_equal(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_there_and_back_gives_every_tensor_to_the_bit():
    theirs = foreign()
    assert_equal(carried_out(TABLE.to_ours(theirs), theirs), OURS)


def test_foreign_tensors_are_cut_swapped_flattened_and_counted_backward():
    theirs = foreign()
    qkv, wide, final = (OURS[name] for name in ("blocks.11.qkv.weight", "blocks.11.wide.weight", "final.weight"))
    assert torch.equal(theirs["layers.11.q.weight"], qkv[:4])
    assert torch.equal(theirs["layers.11.k.weight"], qkv[4:8])
    assert torch.equal(theirs["layers.11.v.weight"], qkv[8:])
    assert torch.equal(theirs["layers.11.narrow.weight"], wide[:2])
    assert torch.equal(theirs["layers.11.rest.weight"], wide[2:])
    assert torch.equal(theirs["last.weight"], torch.cat((final[3:], final[:3])))
    assert theirs["linear.weight"].shape == (4, 3)
    assert torch.equal(theirs["stages.0.part.1.weight"], OURS["levels.2.block.1.weight"])
    assert torch.equal(theirs["stages.2.part.0.weight"], OURS["levels.0.block.0.weight"])


def test_shapes_are_known_without_numbers():
    theirs = foreign()
    shapes = TABLE.to_ours(theirs).shapes(lambda name: tuple(theirs[name].shape))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in OURS.items()}
    back = TABLE.to_foreign(OURS).shapes(lambda name: tuple(OURS[name].shape))
    assert back == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_the_order_of_the_file_does_not_matter():
    theirs = foreign()
    plan = TABLE.to_ours(reversed(theirs))
    assert_equal(carried_out(plan, theirs), OURS)


def test_a_renamed_tensor_is_not_copied():
    tensor = rows(4, 2, seed=1)
    recipe = TABLE.to_ours(["embed.weight"])["in.weight"]
    assert recipe == Recipe((Piece("embed.weight"),))
    assert assemble(recipe, {"embed.weight": tensor}.__getitem__) is tensor


def test_a_part_of_a_stored_tensor_is_a_view_of_it():
    qkv = rows(12, 4, seed=1)
    recipe = TABLE.to_foreign(["blocks.0.qkv.weight"])["layers.0.v.weight"]
    part = assemble(recipe, {"blocks.0.qkv.weight": qkv}.__getitem__)
    assert part.data_ptr() == qkv[8].data_ptr()


def test_a_stored_tensor_is_read_once_for_a_recipe_that_uses_it_twice():
    read = []

    def reading(name):
        read.append(name)
        return OURS[name]

    assemble(TABLE.to_foreign(["final.weight"])["last.weight"], reading)
    assert read == ["final.weight"]


def test_what_is_left_out_on_purpose_is_said():
    plan = TABLE.to_ours(["embed.weight", "unused.weight", "other.1.a", "other.b"])
    assert list(plan) == ["in.weight"]
    assert plan.dropped == ("unused.weight", "other.1.a", "other.b")


@pytest.mark.parametrize("names", [("shared.weight", "tokens.weight"), ("tokens.weight", "shared.weight")])
def test_a_duplicate_serves_alone_and_gives_way_to_the_first(names):
    plan = TABLE.to_ours(names)
    assert plan["words.weight"].sources == ("shared.weight",)
    assert plan.dropped == ("tokens.weight",)
    alone = TABLE.to_ours(["tokens.weight"])
    assert alone["words.weight"].sources == ("tokens.weight",)
    assert alone.dropped == ()


def test_other_ways_to_write_a_name_are_read_and_the_first_is_written():
    plain = native((Row("a.{}.norm.scale", ("x.{}.n",)),))
    table = Table("the toy", (*plain, *alternatives(plain, {"norm.scale": "norm.weight"})))
    assert table.to_ours(["a.3.norm.weight"])["a.3.norm.scale"].sources == ("a.3.norm.weight",)
    assert list(table.to_foreign(["a.3.norm.scale"])) == ["a.3.norm.scale"]
    with pytest.raises(FileError, match=r"f has both a\.3\.norm\.\w+ and a\.3\.norm\.\w+, which stand for the same"):
        table.to_ours(["a.3.norm.scale", "a.3.norm.weight"], "f")


def test_unknown_names_are_named_up_to_three():
    with pytest.raises(FileError, match=r"f has tensors that the toy does not have: a, b, c; use"):
        TABLE.to_ours(["a", "embed.weight", "b", "c"], "f")
    with pytest.raises(FileError, match=re.escape("does not have: a, b, c and 2 more; use")):
        TABLE.to_ours(["a", "b", "c", "d", "e"])
    with pytest.raises(FileError, match=r"model has tensors that the toy does not have: embed\.weight; use"):
        TABLE.to_foreign(["in.weight", "embed.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "layers.00.proj.weight",
        "layers.01.proj.weight",
        "layers.-1.proj.weight",
        "layers.1_0.proj.weight",
        "layers.\u0661.proj.weight",
        f"layers.{'9' * 5000}.proj.weight",
        "layers..proj.weight",
        "layers.{}.proj.weight",
        "layers.0.proj.weight\n",
        "layers.0.proj.weight.0",
        "xlayers.0.proj.weight",
        "layersX0.proj.weight",
    ],
)
def test_names_that_only_resemble_a_known_one_are_unknown(name):
    with pytest.raises(FileError, match="tensors that the toy does not have"):
        TABLE.to_ours([name])


def test_literal_numbers_are_not_open():
    with pytest.raises(FileError, match=r"blocks\.0\.out\.1\.weight"):
        TABLE.to_foreign(["blocks.0.out.1.weight"])


def test_an_incomplete_group_is_named():
    with pytest.raises(FileError, match=r"f is not whole: it has layers\.7\.q\.weight without layers\.7\.k\.weight; "):
        TABLE.to_ours(["layers.7.q.weight", "layers.7.v.weight", "embed.weight"], "f")
    with pytest.raises(FileError, match=r"and 1 more"):
        TABLE.to_ours([f"layers.{n}.q.weight" for n in range(2)])


@pytest.mark.parametrize(
    ("ours", "shapes", "words"),
    [
        pytest.param("blocks.0.qkv.weight", [(4, 4), (4, 4), (4, 3)], "do not fit", id="other columns"),
        pytest.param("blocks.0.qkv.weight", [(4, 4), (2, 4), (6, 4)], "do not fit", id="other rows"),
        pytest.param("blocks.0.wide.weight", [(2, 4), (5, 4)], "do not fit", id="other proportions"),
        pytest.param("blocks.0.qkv.weight", [(), (4, 4), (4, 4)], "is a single number", id="no rows"),
        pytest.param("final.weight", [(5, 4)], "do not divide into 2 parts", id="no halves"),
        pytest.param("conv.weight", [(5, 4, 1)], r"has shape \[5, 4, 1\]", id="no linear layer"),
        pytest.param("conv.weight", [(5, 4, 1, 1)], r"but \(N, K\) becomes", id="a convolution already"),
    ],
)
def test_shapes_that_do_not_fit_are_named_before_numbers_move(ours, shapes, words):
    theirs = list(TABLE.to_foreign([ours]))
    recipe = TABLE.to_ours(theirs)[ours]
    stored = dict(zip(theirs, shapes, strict=True))
    with pytest.raises(FileError, match=words):
        recipe.shape(stored.__getitem__)
    with pytest.raises(FileError, match=words):
        assemble(recipe, {name: torch.zeros(shape) for name, shape in stored.items()}.__getitem__)


def test_a_convolution_with_a_kernel_does_not_become_a_linear_layer():
    recipe = TABLE.to_foreign(["conv.weight"])["linear.weight"]
    with pytest.raises(FileError, match=r"shape \[4, 3, 3, 3\]"):
        recipe.shape({"conv.weight": (4, 3, 3, 3)}.__getitem__)


@pytest.mark.parametrize(
    ("recipe", "suits"),
    [
        pytest.param(Recipe((Piece("a"),)), ("PLAIN", "SCALED", "ROWS", "WHOLE"), id="renamed"),
        pytest.param(Recipe((Piece("a", 1, 2, 3),)), ("PLAIN", "SCALED", "ROWS"), id="cut"),
        pytest.param(
            Recipe((Piece("a", 1, 2, 2), Piece("a", 0, 1, 2)), (1, 1)), ("PLAIN", "SCALED", "ROWS"), id="swapped"
        ),
        pytest.param(Recipe((Piece("a"), Piece("b")), (1, 1)), ("PLAIN", "ROWS"), id="joined"),
        pytest.param(Recipe((Piece("a"),), reshape=Reshape.TO_CONV), ("PLAIN", "SCALED"), id="reshaped"),
    ],
)
def test_a_recipe_says_which_packed_formats_it_can_be_carried_out_on(recipe, suits):
    assert {packing.name for packing in Packing if recipe.suits(packing)} == set(suits)


def pack_rows(tensor):
    """Whole numbers and a scale for each row, both with the tensor's rows as dimension 0."""
    scale = tensor.flatten(1).abs().amax(1) / 127
    return (tensor / scale.view(-1, *[1] * (tensor.dim() - 1))).round().to(torch.int8), scale


def unpack_rows(codes, scale):
    return codes * scale.view(-1, *[1] * (codes.dim() - 1))


def test_packed_rows_are_cut_joined_and_swapped_as_the_numbers_are():
    matrices = {name: tensor for name, tensor in OURS.items() if tensor.dim() > 1}
    codes, scales = ({name: pack_rows(tensor)[n] for name, tensor in matrices.items()} for n in (0, 1))
    numbers = {name: unpack_rows(codes[name], scales[name]) for name in matrices}
    there = TABLE.to_foreign(matrices)
    suited = {name: recipe for name, recipe in there.items() if recipe.suits(Packing.ROWS)}
    assert set(there) - set(suited) == {"linear.weight"}
    for name, recipe in suited.items():
        packed = assemble(recipe, codes.__getitem__), assemble(recipe, scales.__getitem__)
        assert torch.equal(unpack_rows(*packed), assemble(recipe, numbers.__getitem__)), name


def test_plans_go_below_prefixes():
    plan = TABLE.to_ours(["layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight", "unused.weight"])
    below = plan.under(sources="model.", targets="net.")
    assert below["net.blocks.0.qkv.weight"].sources == tuple(f"model.layers.0.{x}.weight" for x in "qkv")
    assert below["net.blocks.0.qkv.weight"].shares == (1, 1, 1)
    assert below.dropped == ("model.unused.weight",)


def test_names_are_matched_without_torch():
    code = (
        "import sys; from flux.weights.renames import LAYOUTS, find_layout; assert 'torch' not in sys.modules; "
        "LAYOUTS['flux1-diffusers'].table.to_ours(['x_embedder.weight']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
