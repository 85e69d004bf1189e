"""Control LoRAs against diffusers' loading of them and against merged weights, and what a model is before and after."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxControlPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from flux.adapters.control_lora import (
    ControlLora,
    LowRank,
    attached,
    check_control_lora,
    control_lora_tensors,
    random_control_lora,
    read_control_lora,
)
from flux.errors import FileError, MismatchError, MissingFileError
from flux.models.flux1 import Conditions, Flux1
from flux.models.positions import image_ids, text_ids
from flux.pipelines.modulation_tables import tabulate
from flux.pipelines.parts import open_transformer
from flux.specs.flux1 import FLUX1
from tests.fixtures.listings import flux1_bfl, flux2_bfl
from tests.oracles import TOLERANCE, flux1_oracle, flux1_to_diffusers, randomise, relative_error, rows
from tests.stored import write_stored
from tests.tiny import write_header_only

TINY = replace(
    FLUX1["flux1-dev"],
    name="tiny",
    context_width=48,
    pooled_width=24,
    hidden=64,
    heads=2,
    axes=(8, 12, 12),
    double_blocks=2,
    single_blocks=2,
)
HEIGHT, WIDTH, TEXT = 4, 3, 5
TOKENS = HEIGHT * WIDTH
NOISY = CONTROL = 64
RANK = 8


def build(spec=TINY, seed=0):
    return randomise(Flux1(spec), seed)


def make_lora(model, seed=1, rank=RANK, dtype=torch.float32):
    """A control LoRA with a branch for every layer and a scale for every norm, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            inputs = NOISY + CONTROL if path == "img_in" else layer.in_features
            r = min(rank, inputs, layer.out_features)
            down = torch.randn(r, inputs, generator=generator) * inputs**-0.5
            up = torch.randn(layer.out_features, r, generator=generator) * 0.3 * r**-0.5
            bias = torch.randn(layer.out_features, generator=generator) * 0.1
            layers[path] = LowRank(down.to(dtype), up.to(dtype), bias.to(dtype))
    norms = {
        name: (1 + 0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        for name, parameter in model.named_parameters()
        if name.endswith("_norm.scale")
    }
    return ControlLora(f"lora {seed}", layers, norms, CONTROL)


def inputs(spec=TINY, controls=1, seed=5):
    """Noisy tokens with what the model and each LoRA take behind them, and the rest of a call."""
    image = rows(2, TOKENS, spec.in_channels + controls * CONTROL, seed=seed)
    conditions = Conditions(rows(2, TEXT, spec.context_width, seed=seed + 1), text_ids(TEXT), image_ids(HEIGHT, WIDTH))
    guidance = torch.tensor([3.5, 30.0]) if spec.guidance_embedding else None
    return image, conditions, torch.tensor([0.37, 1.0]), rows(2, spec.pooled_width, seed=seed + 2), guidance


def run(model, image, conditions, times, pooled, guidance=None):
    return model(image, conditions, model.modulate(model.embed(times, pooled, guidance)))


def run_with(model, loras, strengths, given, **options):
    with attached(model, loras, **options) as attachment:
        attachment.weigh(strengths)
        return run(model, *given)


# diffusers.


def in_diffusers_names(lora):
    """The LoRA as diffusers has it: parts of a fused layer share ``lora_A``."""
    paths = list(lora.layers)
    ups = {f"{path}.weight": branch.up for path, branch in lora.layers.items()}
    biases = {f"{path}.bias": branch.bias for path, branch in lora.layers.items()}
    # Which of our layers each of theirs is of: the layer's number is carried through in place of its rows.
    numbers = {f"{path}.weight": torch.full_like(lora.layers[path].up, n) for n, path in enumerate(paths)}
    origin = flux1_to_diffusers(numbers | biases)
    out = {}
    for name, tensor in flux1_to_diffusers(ups | biases | dict(lora.norms)).items():
        layer, _, kind = name.rpartition(".")
        if ".norm_" in f".{layer.rpartition('.')[2]}" and layer != "norm_out":
            out[f"transformer.{name}"] = tensor
        else:
            out[f"transformer.{layer}.lora_B.{kind}"] = tensor.contiguous()
            if kind == "weight":
                path = paths[int(origin[name].flatten()[0])]
                out[f"transformer.{layer}.lora_A.weight"] = lora.layers[path].down
    return out


def pipeline_of(model):
    return FluxControlPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=flux1_oracle(model),
    )  # fmt: skip


def run_oracle(pipeline, image, conditions, times, pooled, guidance):
    return pipeline.transformer(
        hidden_states=image,
        encoder_hidden_states=conditions.text,
        pooled_projections=pooled,
        timestep=times,
        guidance=guidance,
        img_ids=conditions.image_ids,
        txt_ids=conditions.text_ids,
    ).sample.detach()


@pytest.mark.usefixtures("as_run")
def test_velocity_equals_diffusers_with_the_lora_loaded():
    model = build()
    lora, given = make_lora(model), inputs()
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(in_diffusers_names(lora))
    expected = run_oracle(pipeline, *given)
    assert relative_error(run_with(model, [lora], [1.0], given), expected) <= TOLERANCE
    plain = run(model, given[0][..., :NOISY], *given[1:])
    assert relative_error(plain, expected) > 0.1


@pytest.mark.parametrize("strength", [0.6, 1.7])
def test_velocity_equals_diffusers_at_another_strength_where_norms_have_none(strength):
    model = build()
    lora, given = make_lora(model), inputs()
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(in_diffusers_names(lora), adapter_name="control")
    pipeline.set_adapters(["control"], [strength])
    expected = run_oracle(pipeline, *given)
    assert relative_error(run_with(model, [lora], [strength], given), expected) <= TOLERANCE
    assert relative_error(run_with(model, [lora], [strength], given, norms_by_strength=True), expected) > 1e-3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_velocity_equals_diffusers_with_two_loras_on_one_control_picture():
    """diffusers gives both the same picture, and has no norms of two."""
    model = build()
    loras = [replace_norms(make_lora(model, seed), {}) for seed in (1, 2)]
    image, *rest = inputs()
    pipeline = pipeline_of(model)
    for lora in loras:
        pipeline.load_lora_weights(in_diffusers_names(lora), adapter_name=lora.name.replace(" ", ""))
    pipeline.set_adapters(["lora1", "lora2"], [0.7, 0.4])
    twice = torch.cat((image, image[..., NOISY:]), dim=-1)
    ours = run_with(model, loras, [0.7, 0.4], (twice, *rest))
    assert relative_error(ours, run_oracle(pipeline, image, *rest)) <= TOLERANCE


SCRIPT_LAYERS = (  # those that diffusers' training script for control LoRAs trains by itself, and the modulation
    "x_embedder", "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "norm1.linear", "norm_out.linear",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_diffusers_training_saves_gives_what_it_gave_there(tmp_path, bias, rslora):
    """Some layers only, parts of fused ones, ranks and alphas of their own, and norms below two prefixes."""
    model = build()
    pipeline = pipeline_of(model)
    transformer = pipeline.transformer
    wide = nn.Linear(NOISY + CONTROL, TINY.hidden)
    with torch.no_grad():
        wide.weight.zero_()[:, :NOISY] = transformer.x_embedder.weight
        wide.bias.copy_(transformer.x_embedder.bias)
    transformer.x_embedder = wide
    config = LoraConfig(
        r=6, lora_alpha=3, target_modules=list(SCRIPT_LAYERS), lora_bias=bias, use_rslora=rslora,
        rank_pattern={"attn.to_q": 4}, alpha_pattern={"attn.to_q": 8, "x_embedder": 12},
    )  # fmt: skip
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name or "norm_q" in name or "norm_added_k" in name:
                centre = 0.0 if "lora_" in name else 1.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    given = inputs()
    expected = run_oracle(pipeline, *given)
    layers = get_peft_model_state_dict(transformer)
    norms = {f"transformer.{name}": p for name, p in transformer.named_parameters() if "norm_q" in name}
    norms |= {f"transformer.{name}": p for name, p in transformer.named_parameters() if "norm_added_k" in name}
    FluxControlPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={**layers, **norms}, transformer_lora_adapter_metadata=config.to_dict()
    )
    lora = read_control_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.layers["single_blocks.0.linear1"].up.shape == (7 * TINY.hidden, 6 + 6 + 4)
    assert "single_blocks.0.linear2" not in lora.layers
    assert relative_error(run_with(model, [lora], [1.0], given), expected) <= TOLERANCE


# Merged weights.


def replace_norms(lora, norms):
    return ControlLora(lora.name, lora.layers, norms, lora.channels)


def merged(model, loras, strengths, shares):
    """The model with everything added to its weights, its first layer as wide as the image tokens are."""
    spec = model.spec
    whole = Flux1(replace(spec, in_channels=spec.in_channels + CONTROL * len(loras))).requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entry = torch.zeros(spec.hidden, whole.spec.in_channels)
    entry[:, : spec.in_channels] = state["img_in.weight"]
    state["img_in.weight"] = entry
    own = dict(model.named_parameters())
    for n, (lora, strength, share) in enumerate(zip(loras, strengths, shares, strict=True)):
        for path, branch in lora.layers.items():
            delta = strength * (branch.up.double() @ branch.down.double()).float()
            if path == "img_in":
                start = spec.in_channels + n * CONTROL
                entry[:, :NOISY] += delta[:, :NOISY]
                entry[:, start : start + CONTROL] += delta[:, NOISY:]
            else:
                state[f"{path}.weight"] += delta
            state[f"{path}.bias"] += strength * branch.bias
        for name, scale in lora.norms.items():
            state[name] += share * (scale - own[name])
    whole.load_state_dict(state)
    return whole


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("in_channels", [64, 128, 384])
@pytest.mark.parametrize("strengths", [(1.0,), (0.3,), (2.0,), (0.7, 0.5), (0.0, 1.3), (1.0, 1.0, 0.25)])
def test_velocity_equals_the_explicit_sum_of_weights(strengths, in_channels):
    """Alone and side by side, each with a picture of its own, also on a model that takes a picture itself."""
    spec = replace(TINY, in_channels=in_channels)
    model = build(spec)
    loras = [make_lora(model, seed) for seed in range(1, 1 + len(strengths))]
    given = inputs(spec, len(loras))
    expected = run(merged(model, loras, strengths, strengths), *given)
    by_strength = run_with(model, loras, strengths, given, norms_by_strength=True)
    assert relative_error(by_strength, expected) <= TOLERANCE


def test_norms_without_a_strength_come_in_whole_with_any_and_not_without():
    model = build()
    loras = [make_lora(model, seed) for seed in (1, 2)]
    given = inputs(controls=2)
    expected = run(merged(model, loras, (0.2, 0.0), (1.0, 0.0)), *given)
    assert relative_error(run_with(model, loras, (0.2, 0.0), given), expected) <= TOLERANCE


def test_a_lora_does_not_see_the_other_s_picture():
    model = build()
    loras = [make_lora(model, seed) for seed in (1, 2)]
    image, *rest = inputs(controls=2)
    for place, strengths in ((NOISY, (0.0, 1.0)), (NOISY + CONTROL, (1.0, 0.0))):
        other = image.clone()
        other[..., place : place + CONTROL] = 7.0
        ours = run_with(model, loras, strengths, (image, *rest))
        assert torch.equal(ours, run_with(model, loras, strengths, (other, *rest)))
        assert not torch.equal(ours, run_with(model, loras, strengths[::-1], (other, *rest)))


def test_a_scale_at_strength_1_is_the_lora_s_to_the_bit():
    model = build()
    lora, norm = make_lora(model), model.single_blocks[0].norm.query_norm
    x = rows(1, 2, 3, 32, seed=1).bfloat16()
    with attached(model, [lora]):
        replaced = norm(x)
    norm.scale.copy_(lora.norms["single_blocks.0.norm.query_norm.scale"])
    assert torch.equal(replaced, norm(x))


# Before and after.


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("by_strength", [True, False])
def test_strengths_of_zero_give_the_model_itself_to_the_bit(by_strength):
    model = build()
    image, *rest = inputs(controls=2)
    plain = run(model, image[..., :NOISY].contiguous(), *rest)
    with attached(model, [make_lora(model, 1), make_lora(model, 2)], norms_by_strength=by_strength) as attachment:
        changed = run(model, image, *rest)
        attachment.weigh([0.0, 0.0])
        assert torch.equal(run(model, image, *rest), plain)
        attachment.weigh([1.0, 1.0])
        assert torch.equal(run(model, image, *rest), changed)
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_what_it_was(fails):
    model = build()
    image, *rest = inputs()
    given = (image[..., :NOISY].contiguous(), *rest)
    state, before = model.state_dict(), run(model, *given)
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    try:
        with attached(model, [make_lora(model)]) as attachment:
            assert model.state_dict().keys() == state.keys()
            assert not torch.equal(run(model, image, *rest), before)
            attachment.weigh([0.5])
            if fails:
                raise InterruptedError
    except InterruptedError:
        assert fails
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(run(model, *given), before)


def test_a_lora_that_does_not_fit_leaves_no_trace_of_one_that_does():
    model, other = build(), build(replace(TINY, hidden=32, heads=1))
    with pytest.raises(MismatchError), attached(model, [make_lora(model), make_lora(other)]):
        raise AssertionError("it was taken")
    assert all(not layer.branches for layer in model.modules() if hasattr(layer, "branches"))


def test_tensors_are_moved_and_cast_once_on_the_way_in():
    model = build().bfloat16()
    lora, given = make_lora(model), inputs()
    low = tuple(x.bfloat16() if x.dtype == torch.float32 and x.dim() > 1 else x for x in (given[0], given[3]))
    conditions = given[1]._replace(text=given[1].text.bfloat16())
    with attached(model, [lora], torch.device("cpu"), torch.bfloat16):
        branch = model.txt_in.branches[0]
        assert {branch.down.dtype, branch.up.dtype, branch.bias.dtype} == {torch.bfloat16}
        half = run(model, low[0], conditions, given[2], low[1], given[4])
    exact = run_with(model.float(), [lora], [1.0], given)
    assert half.dtype == torch.bfloat16
    assert relative_error(half, exact) <= 0.05
    with attached(model, [lora], torch.device("cpu"), torch.float32):
        assert model.txt_in.branches[0].down is lora.layers["txt_in"].down


def test_tables_made_ahead_have_the_branches_of_the_modulation():
    model = build()
    vectors = [rows(1, TINY.hidden, seed=n) for n in (1, 2)]

    class Borrowed:
        def __init__(self, prefix):
            self.prefix = prefix

        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    plain = tabulate(model, vectors, Borrowed)
    with attached(model, [make_lora(model)]):
        table = tabulate(model, vectors, Borrowed)
        direct = [model.modulate(vector) for vector in vectors]
    for made, expected, bare in zip(table, direct, plain, strict=True):
        assert torch.equal(made.final, expected.final)
        assert all(torch.equal(*pair) for pair in zip(made.image, expected.image, strict=True))
        assert relative_error(made.final, bare.final) > 0.01
        assert relative_error(made.single[1], bare.single[1]) > 0.01


@pytest.mark.parametrize(("kind", "keep"), [("fp8", "packed"), ("fp8", "numbers"), ("nf4", "packed")])
def test_weights_may_be_absent_when_a_lora_comes_and_packed_when_it_acts(tmp_path, kind, keep):
    spec = replace(FLUX1["flux1-mini"], hidden=128, heads=1, double_blocks=1, single_blocks=1)
    path = write_stored(tmp_path / "model.safetensors", build(spec).state_dict(), kind)
    part = open_transformer(path, torch.device("cpu"), torch.float32, keep=keep)
    numbers = open_transformer(path, torch.device("cpu"), torch.float32, keep="numbers")
    given = inputs(part.spec)
    with numbers.resident() as whole:
        lora = make_lora(whole)
        expected = run(merged(whole, [lora], (0.8,), (1.0,)), *given)
    with torch.inference_mode(), attached(part.module, [lora]) as attachment:
        attachment.weigh([0.8])
        with part.resident() as model:
            assert (model.txt_in.packed is not None) == (keep == "packed")
            assert relative_error(run(model, *given), expected) <= TOLERANCE


def test_strengths_are_counted():
    model = build()
    with attached(model, [make_lora(model)]) as attachment, pytest.raises(ValueError, match="2 strengths .* 1 control"):
        attachment.weigh([1.0, 1.0])


# Training.


def test_a_new_lora_does_nothing_and_every_tensor_of_it_can_learn():
    model = build()
    image, *rest = inputs()
    lora = random_control_lora(model, RANK, generator=torch.Generator().manual_seed(0))
    assert lora.layers["img_in"].down.shape == (RANK, NOISY + CONTROL)
    assert lora.layers["final_layer.linear"].up.shape == (64, RANK)
    tensors = control_lora_tensors(lora)
    assert all(isinstance(tensor, nn.Parameter) for tensor in tensors.values())
    plain = run(model, image[..., :NOISY].contiguous(), *rest)
    optimiser = torch.optim.SGD(tensors.values(), lr=0.1)
    outputs = []
    with attached(model, [lora]):
        for _ in range(3):  # what is computed once and for all would be stale, or could not go backward again
            outputs.append(run(model, image, *rest))
            optimiser.zero_grad()
            outputs[-1].square().mean().backward()
            optimiser.step()
    assert torch.equal(outputs[0], plain)
    assert all(not torch.equal(*pair) for pair in zip(outputs, outputs[1:], strict=False))
    assert all(bool(tensor.grad.abs().sum() > 0) for tensor in tensors.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_new_lora_is_drawn_by_its_generator_as_torch_draws_layers():
    model = build()
    one, same, other = (
        random_control_lora(model, 200, 32, torch.Generator().manual_seed(seed)).layers for seed in (1, 1, 2)
    )
    assert all(torch.equal(branch.down, same[path].down) for path, branch in one.items())
    assert not torch.equal(one["txt_in"].down, other["txt_in"].down)
    assert one["img_in"].down.shape == (64, NOISY + 32)
    mlp = one["double_blocks.0.img_mlp.2"].down.detach()
    assert mlp.shape == (64, 256)
    assert 0.98 * 256**-0.5 < float(mlp.abs().max()) <= 256**-0.5


def test_what_is_trained_is_read_back_from_its_file(tmp_path):
    model = build()
    lora = random_control_lora(model, RANK)
    with torch.no_grad():
        for n, tensor in enumerate(control_lora_tensors(lora).values()):
            tensor.copy_(rows(*tensor.shape, seed=n))
    save_file(control_lora_tensors(lora), tmp_path / "own.safetensors")
    again = read_control_lora(tmp_path / "own.safetensors")
    assert (again.name, again.channels) == ("own.safetensors", CONTROL)
    assert same_tensors(again, lora)
    save_file(control_lora_tensors(again), tmp_path / "copy.safetensors")
    assert same_tensors(read_control_lora(tmp_path / "copy.safetensors"), lora)


def same_tensors(one, other):
    mine, theirs = control_lora_tensors(one), control_lora_tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


# Files.


@pytest.fixture
def written(tmp_path):
    def write(tensors, metadata=None):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", metadata)
        return tmp_path / "x.safetensors"

    return write


PREFIXES = ("", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "transformer.", "base_model.model.", "model.diffusion_model."]
)
def test_black_forest_labs_names_are_read_below_any_prefix(written, prefix, dtype):
    lora = make_lora(build(), dtype=dtype)
    read = read_control_lora(written({prefix + name: tensor for name, tensor in control_lora_tensors(lora).items()}))
    assert same_tensors(read, lora)
    assert {tensor.dtype for tensor in control_lora_tensors(read).values()} == {dtype}


def test_diffusers_names_become_the_same_lora(written):
    lora = make_lora(build())
    assert same_tensors(read_control_lora(written(in_diffusers_names(lora))), lora)


@pytest.mark.parametrize(
    ("down", "up", "bias", "norm"),
    [
        (".lora_down.weight", ".lora_up.weight", ".lora_up.bias", "_norm.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight", ".lora_B.default.bias", "_norm.scale"),
    ],
)
def test_other_programs_endings_are_read(written, down, up, bias, norm):
    lora = make_lora(build())
    words = {".lora_A.weight": down, ".lora_B.weight": up, ".lora_B.bias": bias, "_norm.scale": norm}
    tensors = {}
    for name, tensor in control_lora_tensors(lora).items():
        end = next(end for end in words if name.endswith(end))
        tensors[name.removesuffix(end) + words[end]] = tensor
    assert same_tensors(read_control_lora(written(tensors)), lora)


def test_an_alpha_is_taken_into_the_branch(written):
    lora = make_lora(build())
    read = read_control_lora(written(control_lora_tensors(lora) | {"txt_in.alpha": torch.tensor(2.0)}))
    assert torch.equal(read.layers["txt_in"].up, lora.layers["txt_in"].up * (2 / RANK))
    assert torch.equal(read.layers["txt_in"].bias, lora.layers["txt_in"].bias * (2 / RANK))
    assert torch.equal(read.layers["img_in"].up, lora.layers["img_in"].up)


def test_a_lora_without_biases_and_norms_is_read(written):
    lora = make_lora(build())
    tensors = control_lora_tensors(lora)
    read = read_control_lora(
        written({name: tensor for name, tensor in tensors.items() if "lora_" in name and "bias" not in name})
    )
    assert read.norms == {}
    assert {branch.bias for branch in read.layers.values()} == {None}


def bfl_listing(rank=4, inputs=NOISY + CONTROL):
    """Names and shapes of Black Forest Labs' files, of a lower rank."""
    shapes = {}
    for name, shape in flux1_bfl(inputs).items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            shapes |= {f"{layer}.lora_A.weight": (rank, shape[1]), f"{layer}.lora_B.weight": (shape[0], rank)}
            shapes[f"{layer}.lora_B.bias"] = shape[:1]
        elif kind == "scale":
            shapes[name] = shape
    return shapes


def test_a_file_of_black_forest_labs_sizes_fits_dev_and_schnell_and_nothing_smaller(tmp_path):
    lora = read_control_lora(write_header_only(tmp_path / "flux1-canny-dev-lora.safetensors", bfl_listing()))
    assert (lora.channels, len(lora.layers), len(lora.norms)) == (64, 314, 152)
    for variant in ("flux1-dev", "flux1-schnell", "flux1-kontext-dev", "flux1-fill-dev"):
        check_control_lora(lora, FLUX1[variant])
    with pytest.raises(MismatchError, match="flux1-canny-dev-lora.* width 3072 .* but Foundry Mini has 256"):
        check_control_lora(lora, FLUX1["flux1-mini"])


def test_diffusers_own_names_for_a_file_of_black_forest_labs_become_the_same_lora(tmp_path, written):
    """At the real sizes, for its conversion knows no others.

    It swaps the halves of the last modulation's ``lora_A`` too, whose rows are ranks and not shift and scale: with
    Black Forest Labs' files diffusers' last layer is another one than theirs. What it writes is read as it computes it.
    """
    tensors = {name: rows(*shape, seed=n) for n, (name, shape) in enumerate(bfl_listing(rank=2).items())}
    save_file(tensors, tmp_path / "bfl.safetensors")
    theirs = read_control_lora(written(FluxControlPipeline.lora_state_dict(dict(tensors))))
    last = "final_layer.adaLN_modulation.1"
    assert torch.equal(theirs.layers[last].down, tensors[f"{last}.lora_A.weight"].flip(0))
    mended = {**theirs.layers, last: theirs.layers[last]._replace(down=tensors[f"{last}.lora_A.weight"])}
    ours = read_control_lora(tmp_path / "bfl.safetensors")
    assert same_tensors(ControlLora("mended", mended, theirs.norms, CONTROL), ours)


def test_a_lora_for_a_deeper_model_is_refused_with_the_layers_that_are_lacking():
    lora = make_lora(build(replace(TINY, double_blocks=3)))
    with pytest.raises(
        MismatchError, match=r"lora 1 does not fit .*FLUX.1 \[dev\].* double_blocks.2.img_mod.lin, .* more"
    ):
        check_control_lora(lora, TINY)
    check_control_lora(make_lora(build()), replace(TINY, double_blocks=3))


def test_scales_of_another_head_size_are_refused():
    lora = make_lora(build())
    with pytest.raises(MismatchError, match="query_norm.scale"):
        check_control_lora(lora, replace(TINY, heads=4, axes=(4, 6, 6)))


def test_a_schnell_goes_without_the_branches_of_the_guidance_embedder():
    model, lora = build(replace(TINY, guidance_embedding=False)), make_lora(build())
    given = inputs(model.spec)
    shorn = {path: branch for path, branch in lora.layers.items() if not path.startswith("guidance_in")}
    expected = run(merged(model, [ControlLora("", shorn, lora.norms, CONTROL)], (1.0,), (1.0,)), *given)
    assert relative_error(run_with(model, [lora], [1.0], given), expected) <= TOLERANCE


def kohya(shapes):
    out = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            layer = "lora_unet_" + layer.replace(".", "_")
            out |= {f"{layer}.lora_down.weight": (4, shape[1]), f"{layer}.lora_up.weight": (shape[0], 4)}
    return out


def lora_of(shapes):
    out = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            out |= {f"{layer}.lora_A.weight": (4, shape[1]), f"{layer}.lora_B.weight": (shape[0], 4)}
    return out


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (lora_of(flux1_bfl(64)), "a LoRA for FLUX.1 .* whose first layer takes 64 channels, but a control LoRA"),
        (bfl_listing(inputs=384), "whose first layer takes 384 channels, but a control LoRA"),
        (kohya(flux1_bfl(128)), "a LoRA for FLUX.1 in kohya's names, but a control LoRA"),
        (lora_of(flux2_bfl("klein-4b")), r"a LoRA for FLUX.2 \[klein\] 4B .*, but a control LoRA"),
        (flux1_bfl(128), r"FLUX.1 .*, but a control LoRA"),
        ({"something": (2, 2)}, "of no kind that is known here, but a control LoRA"),
    ],
)
def test_what_is_no_control_lora_is_named(tmp_path, shapes, words):
    path = write_header_only(tmp_path / "x.safetensors", shapes)
    with pytest.raises(MismatchError, match=f"x.safetensors is .*{words} .*choose a file as flux1-canny"):
        read_control_lora(path)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingFileError, match=r"none.safetensors was not found"):
        read_control_lora(tmp_path / "none.safetensors")


QUERIES = "transformer_blocks.0.attn.to_q"
BROKEN = {
    "no up": ({"txt_in.lora_B.weight": None}, "txt_in.lora_A.weight without what goes up again"),
    "no down": ({"txt_in.lora_A.weight": None}, "txt_in.lora_B.* without what goes down again"),
    "ranks": ({"txt_in.lora_A.weight": (3, 48)}, r"tensors of txt_in do not fit .*lora_A.weight \[3, 48\]"),
    "bias": ({"txt_in.lora_B.bias": (63,)}, r"tensors of txt_in do not fit .*bias \[63\]"),
    "not a matrix": ({"txt_in.lora_A.weight": (RANK, 48, 1)}, "tensors of txt_in do not fit"),
    "alpha": ({"txt_in.alpha": (2,)}, "tensors of txt_in do not fit"),
    "alpha that is none": ({"txt_in.alpha": float("nan")}, "alpha is nan for txt_in"),
    "unknown": ({"txt_in.lora_mid.weight": (2, 2)}, "that a control LoRA .* does not have: txt_in.lora_mid.weight;"),
    "a weight": ({"txt_in.weight": (64, 48)}, "does not have: txt_in.weight;"),
    "another layer": ({"distilled.lora_A.weight": (2, 2)}, "does not have: distilled.lora_A.weight;"),
    "twice": ({"transformer.txt_in.lora_A.weight": (RANK, 48)}, "both .* stand for the same tensor"),
    "whole and in parts": (
        {f"{QUERIES}.lora_A.weight": (2, 64), f"{QUERIES}.lora_B.weight": (64, 2)},
        "double_blocks.0.img_attn.qkv twice",
    ),
    "by two names": (
        {"context_embedder.lora_A.weight": (2, 48), "context_embedder.lora_B.weight": (64, 2)},
        "txt_in twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_with_the_tensor_at_fault(written, fault):
    changes, words = BROKEN[fault]
    tensors = control_lora_tensors(make_lora(build()))
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = torch.tensor(change) if isinstance(change, float) else torch.ones(change)
    with pytest.raises(FileError, match=f"^x.safetensors.*{words}"):
        read_control_lora(written(tensors))


def test_parts_that_do_not_belong_together_are_refused(written):
    tensors = in_diffusers_names(make_lora(build()))
    layer = "transformer.single_transformer_blocks.1.proj_mlp.lora_B"
    tensors |= {f"{layer}.weight": torch.ones(100, RANK), f"{layer}.bias": torch.ones(100)}
    with pytest.raises(FileError, match=r"single_blocks.1.linear1 do not fit each other"):
        read_control_lora(written(tensors))


@pytest.mark.parametrize(
    ("config", "words"),
    [("{", "lora_adapter_metadata is not JSON"), (json.dumps({"transformer.lora_alpha": "much"}), "alpha is 'much'")],
)
def test_metadata_that_says_nothing_usable_is_refused(written, config, words):
    path = written(control_lora_tensors(make_lora(build())), {"lora_adapter_metadata": config})
    with pytest.raises(FileError, match=words):
        read_control_lora(path)
