"""Plans from specs alone: real models take what they are known to take, and policies do what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.random_weights import draw, open_random
from flux.errors import BudgetError, UserError
from flux.memory.outlines import Outlines
from flux.memory.plan import Rates
from flux.memory.policy import GIB, Policy, read_policy
from flux.mini.files import open_mini
from flux.ops import devices
from flux.pipelines import stage_work
from flux.pipelines.modules import parameter_shapes
from flux.pipelines.planning import Job, grant, plan_run, planned_of_part, planned_of_spec, working_bytes
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.text import CLIP_L, T5_XXL
from flux.specs.vision import VISION_TOWERS
from flux.weights.formats import chunks

BF16 = torch.bfloat16
SQUARE = Job(width=1024, height=1024)
TERA, GIGA = 1e12, 1e9


@pytest.fixture(scope="module")
def parts():
    specs = (AUTOENCODERS["flux1-ae"], FLUX1["flux1-dev"], T5_XXL, CLIP_L, VISION_TOWERS["siglip-so400m-384"])
    return [planned_of_spec(spec, BF16) for spec in specs]


def plan(parts, policy="keep", job=SQUARE, available=80 * GIB):
    return plan_run(parts, job, read_policy(policy), device="cuda", available=available)


@pytest.mark.parametrize(
    ("name", "job", "tera"),
    [
        ("flux1-dev", SQUARE, 74.385),  # flux-family.md 10.2
        ("flux1-kontext-dev", replace(SQUARE, references=((1024, 1024),)), 165.45),
    ],
)
def test_operations_of_a_step_are_those_that_are_known(name, job, tera):
    [stage] = plan([planned_of_spec(FLUX1[name], BF16)], job=job).stages
    assert stage.operations / TERA == pytest.approx(tera, rel=1e-3)


def test_flux1_dev_keeps_what_is_not_modulation(parts):
    stage = plan(parts).stage("transformer")
    assert stage.weights / GIGA == pytest.approx(23.80, abs=0.01)
    assert stage.resident_bytes / GIGA == pytest.approx(17.31, abs=0.01)
    assert stage.once / GIGA == pytest.approx(6.49, abs=0.01)
    assert (stage.streamed_bytes, stage.ring_bytes) == (0, 0)


def test_a_cpu_without_units_for_bf16_keeps_it_as_it_is_stored():
    on_cpu = planned_of_spec(FLUX1["flux1-dev"], torch.float32, torch.device("cpu"))
    [stage] = plan_run([on_cpu], SQUARE, read_policy("keep"), device="cpu", available=80 * GIB).stages
    assert stage.resident_bytes / GIGA == pytest.approx(17.31, abs=0.02)  # biases are widened
    [stage] = plan([planned_of_spec(FLUX1["flux1-dev"], torch.float32)]).stages
    assert stage.resident_bytes / GIGA == pytest.approx(2 * 17.31, abs=0.02)


def test_stages_come_in_the_order_in_which_they_run(parts):
    whole = plan(parts, job=replace(SQUARE, starts=True, views=1))
    assert [stage.name for stage in whole.stages] == ["clip", "t5", "vision", "encode", "transformer", "decode"]
    assert [stage.name for stage in plan(parts).stages] == ["clip", "t5", "transformer", "decode"]


@pytest.mark.parametrize("policy", ["keep", "balance", "save", "12", "auto"])
def test_bytes_add_up(parts, policy):
    for stage in plan(parts, policy, available=10 * GIB).stages:
        assert stage.peak_bytes == stage.resident_bytes + stage.ring_bytes + stage.activations + stage.workspace
        assert stage.footprint.others + sum(stage.footprint.blocks.kept) == stage.resident_bytes + stage.streamed_bytes


def test_policies_take_less_and_less(parts):
    peaks = [plan(parts, policy).stage("transformer").peak_bytes for policy in ("keep", "14", "balance", "6", "save")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert plan(parts, "6").peak_bytes <= 6 * GIB


@pytest.mark.parametrize(("dtype", "most"), [(BF16, 0.6), (torch.float32, 1.0)])
def test_t5_xxl_in_bf16_needs_no_more_than_a_gib(dtype, most):
    """In ComfyUI it computes in fp32."""
    stage = plan([planned_of_spec(T5_XXL, dtype)], "save").stage("t5")
    assert stage.peak_bytes <= most * GIB


def test_of_the_tables_of_t5_only_rows_are_fetched(parts):
    stage = plan(parts, "save").stage("t5")
    assert stage.footprint.fetched == (
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    )
    assert plan(parts).stage("t5").footprint.fetched == ()


def test_auto_streams_only_what_does_not_fit(parts):
    assert plan(parts, "auto", available=24 * GIB).stage("transformer").streamed_bytes == 0
    tight = plan(parts, "auto", available=12 * GIB).stage("transformer")
    assert 0 < tight.streamed_bytes < tight.weights
    assert tight.peak_bytes <= 12 * GIB


@pytest.mark.parametrize(("policy", "free", "stays"), [("keep", 24, True), ("keep", 18, False), ("save", 24, False)])
def test_where_another_picture_follows_decoding_counts_the_transformer_that_stays(parts, policy, free, stays):
    alone, several = (plan(parts, policy, replace(SQUARE, pictures=count), free * GIB) for count in (1, 3))
    assert (several.stage("decode").beside > 0) == stays
    assert several.stage("transformer") == alone.stage("transformer")
    weights = alone.stage("transformer").footprint.device_bytes
    beside = several.stage("decode").peak_bytes - alone.stage("decode").peak_bytes
    assert (weights < beside < 1.02 * weights) if stays else beside == 0  # with the table of modulations


def test_a_budget_below_the_least_is_refused(parts):
    with pytest.raises(UserError, match=r"a budget of 1 GiB is below the least that this takes, \d\.\d+ GiB"):
        plan(parts, "1")


def test_two_transformers_share_a_budget_and_each_has_room_beside_the_other(parts):
    both = [*parts, planned_of_spec(FLUX1["flux1-canny-dev"], BF16)]
    stages = [plan(both, "16").stage(name) for name in ("transformer", "transformer 2")]
    assert sum(stage.footprint.device_bytes for stage in stages) <= 16 * GIB
    assert all(14 * GIB < stage.peak_bytes <= 16 * GIB for stage in stages)
    assert all(0 < stage.streamed_bytes < stage.weights for stage in stages)
    assert stages[0].beside >= stages[1].footprint.device_bytes
    assert stages[0].limit > plan(parts, "16").stage("transformer").limit // 2
    alone = plan(parts, "16").stage("transformer")
    assert alone.streamed_bytes < stages[0].streamed_bytes
    assert alone.beside == 0


def test_the_least_of_two_transformers_is_that_of_both(parts):
    own, other = parts[1], planned_of_spec(FLUX1["flux1-canny-dev"], BF16)
    leasts = []
    for given in ([own], [other], [own, other]):
        with pytest.raises(BudgetError) as fault:
            plan(given, "0.01")
        leasts.append(fault.value.least)
    with pytest.raises(BudgetError):
        plan([own, other], str(1.01 * max(leasts[:2]) / GIB))
    [first, _] = plan([own, other], str(1.001 * leasts[2] / GIB)).stages
    assert len(first.footprint.blocks.streamed) == 57


def test_what_stays_with_a_transformers_weights_is_taken_from_their_room(parts):
    """A control LoRA."""
    lora = 2 * GIB
    without, beside = (plan([replace(parts[1], further=size)], "14").stage("transformer") for size in (0, lora))
    assert beside.limit == without.limit - lora
    assert without.streamed_bytes < beside.streamed_bytes
    assert 14 * GIB - GIB // 2 < beside.peak_bytes <= 14 * GIB
    assert beside.as_json()["beside_bytes"] == lora


def test_more_pictures_and_pixels_take_more(parts):
    jobs = (SQUARE, replace(SQUARE, batch=4), replace(SQUARE, width=2048, height=2048))
    one, four, large = (plan(parts, job=job).stage("transformer").activations for job in jobs)
    assert four == pytest.approx(4 * one, rel=0.1)
    assert 3 * one < large < four  # of the same pixels, with the text's tokens once


@pytest.mark.parametrize(("prompts", "tensors"), [(1, 4), (2, 8)])
def test_a_step_cache_keeps_what_the_last_step_did_until_the_next_has_succeeded(parts, prompts, tensors):
    """Two tensors of the picture's tokens for each prompt, of the last step and of the one that runs."""
    job = replace(SQUARE, prompts=prompts)
    plain, cached = (plan(parts, job=own).stage("transformer").activations for own in (job, replace(job, cached=True)))
    assert cached - plain == pytest.approx(tensors * 4096 * 3072 * 2, rel=0.01)


def test_seconds_follow_the_slower_of_reading_and_computing(parts):
    rates = Rates(bytes=20e9, operations=500e12)
    kept, streamed = plan(parts).stage("transformer"), plan(parts, "save").stage("transformer")
    assert kept.seconds(rates) == pytest.approx(23.8 / 20 + 28 * 74.385 / 500, rel=0.01)
    assert streamed.seconds(rates) == pytest.approx(6.5 / 20 + 28 * streamed.streamed_bytes / 20e9, rel=0.02)


def test_a_plan_is_plain_values(parts):
    facts = json.loads(json.dumps(plan(parts, "balance").as_json()))
    assert facts["policy"] == "balance"
    assert list(facts["stages"]) == ["clip", "t5", "transformer", "decode"]
    assert facts["stages"]["transformer"]["streamed_bytes"] > 0
    assert facts["peak_bytes"] == max(stage["peak_bytes"] for stage in facts["stages"].values())


def test_pictures_are_decoded_in_strips_where_one_piece_is_too_much(parts):
    large = replace(SQUARE, width=2048, height=2048)
    whole, striped = (plan(parts, policy, large).stage("decode") for policy in ("keep", "3"))
    assert (whole.in_strips, striped.in_strips) == (False, True)
    assert striped.peak_bytes <= 2.5 * GIB < 3 * GIB < whole.peak_bytes
    assert not plan(parts, "3").stage("decode").in_strips
    assert plan(parts, "3").stage("transformer").peak_bytes <= 3 * GIB


@pytest.mark.parametrize("side", [64, 128, 256])
def test_small_pictures_are_decoded_in_one_piece_where_strips_take_more(parts, side):
    small = replace(SQUARE, width=side, height=side, starts=True)
    for stage in ("encode", "decode"):
        kept, saved = (plan(parts, policy, small).stage(stage).peak_bytes for policy in ("keep", "save"))
        assert saved <= kept


def test_a_picture_that_is_too_large_for_one_piece_is_granted_strips_though_weights_are_small(monkeypatch):
    model = open_mini()
    monkeypatch.setattr("flux.pipelines.planning.available_bytes", lambda device: 2 << 30)
    granted = grant([model.autoencoder], Job(width=8192, height=8192), Policy())
    assert granted.in_strips == {"decode"}
    assert grant([model.autoencoder], Job(width=128, height=128), Policy()).in_strips == set()


SMALL = replace(FLUX1["flux1-mini"], name="small", double_blocks=2, single_blocks=2)
TURING, HOPPER = (7, 5), (9, 0)
CHUNK = 1 << 12  # numbers that are unpacked at once


@pytest.fixture
def card(monkeypatch):
    """What the one card is of, and a transformer of random weights on it, of which none is there yet."""

    def part(number, stored, dtype=BF16):
        monkeypatch.setattr(chunks, "DEVICE_CHUNK", CHUNK)
        monkeypatch.setattr(devices, "_capability", lambda device: number if device.startswith("cuda") else (0, 0))
        stage_work._work.cache_clear()  # of plans for a card of another generation by the same name
        return planned_of_part(
            open_random(SMALL, draw(SMALL, torch.device("cpu"), stored), torch.device("cuda"), dtype)
        )

    yield part
    stage_work._work.cache_clear()


def workspace(part, side, policy="keep"):
    [stage] = plan([part], policy, Job(width=side, height=side)).stages
    return stage.workspace


def test_cards_that_multiply_fp8_unpack_nothing(card):
    """They narrow what goes in, so that large pictures take more; others unpack a matrix, whatever the picture."""
    old, new = ([workspace(card(number, "fp8"), side) for side in (64, 512)] for number in (TURING, HOPPER))
    largest = max(
        2 * math.prod(shape) for name, shape in parameter_shapes(SMALL).items() if "blocks" in name and len(shape) == 2
    )
    assert 0 < old[0] <= largest + 4 * CHUNK
    assert old[1] <= largest + 4 * CHUNK
    assert new[0] < old[0]
    assert new[1] > 4 * new[0]
    assert new[1] > largest


def test_numbers_of_another_type_are_cast_where_they_are_streamed(card):
    assert workspace(card(TURING, "bf16"), 256, "save") == 0
    in_fp16 = card(TURING, "bf16", torch.float16)
    assert workspace(in_fp16, 64) == 0, "those that stay were cast when they came"
    assert workspace(in_fp16, 64, "save") > 0
    assert workspace(planned_of_spec(SMALL, torch.float16), 64, "save") == workspace(in_fp16, 64, "save")


def test_a_job_is_traced_once_whoever_asks():
    stage_work._work.cache_clear()
    job = Job(width=64, height=64)
    working_bytes(SMALL, BF16, job)
    working_bytes(SMALL, BF16, job, packed=Outlines("cuda", {}))
    plan([planned_of_spec(SMALL, BF16)], "keep", job)
    assert stage_work._work.cache_info().misses == 1
