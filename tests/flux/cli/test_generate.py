"""One command from a prompt to a picture in a file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from flux.cli import arguments, arguments_guided, files
from flux.cli.console import Bar
from flux.editing.outpaint import ANCHORS
from flux.images import read_settings
from flux.mini.files import (
    CONTROL_LORAS,
    GUIDED,
    MINI,
    MINI_SCHNELL,
    REDUX_MINI_FILE,
    SIGLIP_MINI_FILE,
)
from flux.models.positions import LAYOUTS
from flux.pipelines.guided import ROUNDINGS
from flux.preprocess.control import FITS
from flux.preprocess.depth import NORMALISATIONS
from flux.preprocess.references import REFERENCE_FITS
from flux.preprocess.vision import VIEWS
from flux.sampling.noise import NOISE_STYLES
from flux.sampling.schedules import SCHEDULES
from flux.sampling.solvers import SOLVERS
from flux.specs.flux1 import FLUX1
from flux.version import VERSION
from tests.conftest import ROOT


def pixels(path):
    return np.asarray(Image.open(path))


def run(*words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "flux", *map(str, words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip


def test_the_embedded_model_draws_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "new" / "a.png"
    done = run("generate", "a red circle", "--model", "mini", "--steps", 1, "--seed", 7, "--out", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert pixels(out).shape == (128, 128, 3)
    assert os.listdir(out.parent) == ["a.png"]


def test_the_path_goes_to_stdout_and_the_settings_into_the_picture(draw, tmp_path):
    said = draw("--out", tmp_path / "a.png", "--quiet")
    assert (said.code, said.out, said.err) == (0, [str(tmp_path / "a.png")], [])
    settings = read_settings(tmp_path / "a.png")
    expected = {"prompt": "a red circle", "seed": 5, "steps": 2, "width": 32, "height": 32, "solver": "euler"}
    assert expected.items() <= settings.items()
    assert settings["model_file"] == "tiny.safetensors"


def test_the_same_command_writes_the_same_bytes(draw, tmp_path):
    for name in ("a.png", "b.png"):
        draw("--out", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_count_is_numbered_and_each_seed_said(draw, tmp_path):
    said = draw("--out", tmp_path / "a.png", "--count", 3)
    names = ["a-1.png", "a-2.png", "a-3.png"]
    assert said.out == [str(tmp_path / name) for name in names]
    assert [line for line in said.err if "seed" in line] == [f"note: {n} has seed {5 + i}" for i, n in enumerate(names)]
    draw("--out", tmp_path / "single.png", seed=6)
    assert np.array_equal(pixels(tmp_path / "a-2.png"), pixels(tmp_path / "single.png"))


def test_a_named_file_is_replaced_and_a_folder_never_overwritten(draw, tmp_path):
    for _ in range(2):
        assert draw("--out", tmp_path / "a.png").code == 0
    folder = f"{tmp_path}/folder/"
    assert [draw("--out", folder).out[0] for _ in range(2)] == [f"{folder}tiny-5.png", f"{folder}tiny-5-2.png"]
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder"]


def test_a_seed_that_was_not_given_is_drawn_and_said(draw, tmp_path):
    seeds = []
    for name in ("a.png", "b.png"):
        said = draw("--out", tmp_path / name, seed=None)
        seeds.append(read_settings(tmp_path / name)["seed"])
        assert f"note: seed {seeds[-1]} was drawn; --seed {seeds[-1]} gives the same again" in said.err
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (("--solver", "heun"), {"solver": "heun"}),
        (("--scheduler", "beta"), {"schedule": "beta"}),
        (("--noise", "bfl"), {"noise": "bfl"}),
        (("--mu", "2.5"), {"mu": 2.5}),
        (("--sigmas", "1,0.4,0"), {"sigmas": [1.0, 0.4, 0.0], "schedule": "explicit"}),
        (("--guidance", "7"), {"guidance": 7.0}),
        (("--negative", "blue"), {"negative": "blue", "cfg": 3.0}),
        (("--negative", "blue", "--cfg", "2"), {"negative": "blue", "cfg": 2.0}),
        (("--clip-prompt", "a blue star"), {"clip_prompt": "a blue star"}),
        (("--dtype", "bf16"), {}),
        (("--device", "cpu"), {}),
    ],
)
def test_each_option_reaches_the_picture(draw, tmp_path, words, settings):
    assert draw("--out", tmp_path / "plain.png").code == 0
    assert draw("--out", tmp_path / "a.png", *words).code == 0
    assert settings.items() <= read_settings(tmp_path / "a.png").items()
    same = np.array_equal(pixels(tmp_path / "plain.png"), pixels(tmp_path / "a.png"))
    assert same == (words == ("--device", "cpu"))


def test_a_picture_can_be_changed_in_part(draw, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    Image.new("L", (32, 32), 0).save(tmp_path / "nothing.png")
    start = ("--image", tmp_path / "start.png")
    for name, words in {
        "kept.png": ("--denoise", "0"),
        "masked.png": ("--mask", tmp_path / "nothing.png"),
        "changed.png": ("--denoise", "0.7"),
    }.items():
        assert draw("--out", tmp_path / name, *start, *words, width=None, height=None).code == 0
    assert np.array_equal(pixels(tmp_path / "kept.png"), pixels(tmp_path / "masked.png"))
    assert not np.array_equal(pixels(tmp_path / "kept.png"), pixels(tmp_path / "changed.png"))


def test_rounding_cutting_and_ignoring_are_noted(draw, tmp_path):
    said = draw(
        "--out", tmp_path / "a.png", "--negative", "blue", "--cfg", "1", prompt="red " * 200, width=30
    )  # fmt: skip
    assert said.code == 0
    text = "\n".join(said.err)
    assert "note: width 30 is not a multiple of 16: 32 is used" in said.err
    assert "note: the prompt has" in text
    assert "no effect at cfg 1" in text
    assert "note: its sizes are no release's" in text


def test_the_record_says_what_made_the_pictures(draw, tiny, tmp_path):
    said = draw("--out", tmp_path / "a.png", "--record", "--count", 2, width=30)
    assert said.out[-1] == str(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["versions"]["fluxfoundry"] == VERSION
    assert record["device"]["device"] == "cpu"
    assert set(record["dtypes"].values()) == {"float32"}
    hashes = {file["role"]: file["sha256"] for file in record["files"]}
    assert hashes["transformer"] == hashlib.sha256(tiny.transformer.read_bytes()).hexdigest()
    assert set(hashes) == {"transformer", "clip", "t5", "autoencoder", "clip_tokenizer", "t5_tokenizer"}
    assert [(p["file"], p["seed"]) for p in record["pictures"]] == [("a-1.png", 5), ("a-2.png", 6)]
    assert record["pictures"][1]["sha256"] == hashlib.sha256((tmp_path / "a-2.png").read_bytes()).hexdigest()
    assert record["pictures"][0]["settings"]["prompt"] == "a red circle"
    assert set(record["seconds"]) == {"opening", "text", "loading", "sampling", "decoding", "saving"}
    assert any("width 30" in remark for remark in record["notes"])


def test_attention_is_chosen_told_and_recorded(draw, tmp_path):
    said = draw("--out", tmp_path / "a.png", "--record", attention="math")
    told = "math (as it is written down, for comparison): asked for"
    assert f"attention by {told}" in " ".join(said.err)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["attention"] == told
    assert record["pictures"][0]["settings"]["attention"] == read_settings(tmp_path / "a.png")["attention"] == "math"
    said = draw("--out", tmp_path / "b.png", "--record")
    assert "attention" not in " ".join(said.err)
    assert json.loads((tmp_path / "b.json").read_text())["attention"].startswith("sdpa (torch's, by its own choice)")
    assert "attention" not in read_settings(tmp_path / "b.png")
    difference = np.asarray(Image.open(tmp_path / "a.png"), int) - np.asarray(Image.open(tmp_path / "b.png"), int)
    assert abs(difference).max() <= 1


def test_a_run_is_compiled_if_that_is_asked(draw, tmp_path, monkeypatch):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("flux.pipelines.compiled.INDUCTOR", count)
    for name, words in (("a", ["--compile"]), ("b", [])):
        assert draw("--out", tmp_path / f"{name}.png", *words).code == 0
        assert len(graphs) == 2
    assert read_settings(tmp_path / "a.png")["compiled"] is True
    assert "compiled" not in read_settings(tmp_path / "b.png")
    difference = np.asarray(Image.open(tmp_path / "a.png"), int) - np.asarray(Image.open(tmp_path / "b.png"), int)
    assert abs(difference).max() <= 1


def test_the_record_names_the_picture_and_mask_that_a_run_began_with(draw, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "all.png")
    given = {"image": tmp_path / "start.png", "mask": tmp_path / "all.png"}
    assert draw("--out", tmp_path / "a.png", "--record", **given).code == 0
    files = {file["role"]: file for file in json.loads((tmp_path / "a.json").read_text())["files"]}
    for role, path in given.items():
        assert files[role]["name"] == path.name
        assert files[role]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_record_in_a_folder_replaces_nothing(draw, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tiny-5.json").write_text("mine")
    said = draw("--out", folder, "--record")
    assert said.out == [str(folder / "tiny-5-2.png"), str(folder / "tiny-5-2.json")]
    assert (folder / "tiny-5.json").read_text() == "mine"


def test_a_name_that_the_terminal_cannot_show_is_no_fault(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "flux", "generate", "a star", "--seed", "1", "--steps", "1", "--out", "☃.png"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert run.stdout == "\\u2603.png\n"
    assert (tmp_path / "☃.png").is_file()


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_are_written_by_suffix(draw, tmp_path, suffix):
    assert draw("--out", tmp_path / f"a.{suffix}").code == 0
    assert Image.open(tmp_path / f"a.{suffix}").format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]


def test_a_mini_transformer_elsewhere_takes_the_embedded_encoders(flux, tiny, tmp_path):
    said = flux("generate", "x", "--model", tiny.transformer, "--steps", 1, "--seed", 1, "--out", tmp_path / "a.png")
    assert said.code == 0
    assert pixels(tmp_path / "a.png").shape == (128, 128, 3)


def test_control_c_ends_with_130_and_leaves_nothing(tiny, tmp_path):
    words = ("generate", "x", "--model", tiny.transformer, "--steps", 9999, "--seed", 1, "--out", tmp_path / "a.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "flux", *map(str, words)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        # A shell starts what it puts into the background deaf to control-c; these tests may be there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    # The note about the file's sizes comes when the model is open and sampling begins.
    assert "no release's" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    *notes, last = err.splitlines()
    assert last == "error: interrupted; no file was left half written"
    assert all(line.startswith("note: ") for line in notes)
    assert os.listdir(tmp_path) == []


def test_help_needs_no_torch_and_lists_what_there_is():
    code = (
        "import sys; from flux.cli.main import main; code = main(['generate', '--help']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("--width", "--guidance", "--record", "--tokenizers", "--denoise", "dpmpp_2m"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fill", ("IMAGE MASK PROMPT", "--grow", "--blur", "--context", "--no-crop", "--rounding", "fill-mini")),
        ("outpaint", ("IMAGE PROMPT", "--left", "--aspect", "--feather", "--anchor", "fill-mini")),
        ("control", ("--type {canny,depth,image}", "--ready", "--depth-model", "--lora", "--save-control")),
        ("redux", ("IMAGE [IMAGE ...]", "--strength S[,S...]", "--grid", "--tokens", "--vision", "--strength-mode")),
        ("edit", ("IMAGE PROMPT", "--reference", "--layout", "--budget", "kontext-mini")),
    ],
)
def test_help_of_guided_commands_begins_with_what_they_take_and_ends_with_examples(flux, command, words):
    said = flux(command, "--help")
    text = "\n".join(said.out)
    assert said.code == 0
    assert said.out[0] == f"usage: python -m flux {command} {words[0]} [options]" or words[0] in said.out[0]
    for word in (*words, "--start", "--model", "--out", "--seed", "--record", "--steps", "examples:"):
        assert word in text
    assert f"  python -m flux {command} " in text[text.index("examples:") :]


def test_nothing_brings_the_compiler_in(tmp_path):
    code = (
        "import sys; from flux.cli.main import main; "
        "assert main(['generate', 'x', '--steps', '1', '--seed', '1', '--quiet', '--out', sys.argv[1]]) == 0; "
        "slow = {'torch._dynamo', 'torch._inductor', 'sympy', 'cv2', 'scipy', 'transformers'} & set(sys.modules); "
        "assert not slow, slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_names_in_the_help_are_the_engine_s():
    assert set(arguments.SOLVERS) == set(SOLVERS)
    assert set(arguments.SCHEDULERS) == set(SCHEDULES)
    assert set(arguments.NOISES) == set(NOISE_STYLES) - {"comfyui_batch"}  # one draw for a batch: has no seed an image


def test_the_names_in_the_help_of_guided_commands_are_the_engine_s():
    assert arguments_guided.ROUNDINGS == ROUNDINGS
    assert arguments_guided.ANCHORS == ANCHORS
    assert arguments_guided.CONTROL_FITS == FITS
    assert set(arguments_guided.DEPTH_SCALES) < set(NORMALISATIONS)
    assert arguments_guided.VIEWS == VIEWS
    assert arguments_guided.REFERENCE_FITS == REFERENCE_FITS
    assert arguments_guided.LAYOUTS == LAYOUTS


def test_the_embedded_files_are_the_package_s():
    own = [MINI, MINI_SCHNELL, *GUIDED.values()]
    assert [files.WEIGHTS / FLUX1[name].files[0] for name in files.EMBEDDED] == [row.transformer for row in own]
    assert files.EMBEDDED_LORAS == CONTROL_LORAS
    parts = {
        "clip-mini": MINI.clip, "t5-mini": MINI.t5, "flux1-mini-ae": MINI.autoencoder,
        "siglip-mini": SIGLIP_MINI_FILE, "flux1-redux-mini": REDUX_MINI_FILE,
    }  # fmt: skip
    assert parts == files.EMBEDDED_PARTS


def test_the_bar_is_shown_on_a_terminal_only(capfd, monkeypatch):
    with Bar(quiet=False) as bar:
        bar.show("loading", 1, 2)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Bar(quiet=True) as bar:
        bar.show("loading", 1, 2)
    assert capfd.readouterr().err == ""
    with Bar(quiet=False) as bar:
        for stage in ("loading", "sampling"):
            for done in range(3):
                bar.show(stage, done, 2)
    shown = capfd.readouterr().err
    assert shown.index("loading") < shown.index("sampling")


def test_a_report_says_what_stages_took(flux, tmp_path):
    words = ("generate", "a red circle", "--steps", 2, "--seed", 1, "--report", "--record")
    done = flux(*words, "--out", tmp_path / "a.png")
    assert done.code == 0
    assert any(line.startswith("transformer") and "2 x " in line for line in done.err)
    [record] = tmp_path.glob("*.json")
    assert len(json.loads(record.read_text())["memory"]["stages"]["transformer"]["taken"]["pass_seconds"]) == 2


def test_what_a_step_cache_skipped_is_told_and_written_down(draw, tmp_path):
    out = tmp_path / "a.png"
    words = ("--record", "--step-cache", 1, "--step-cache-skips", 2, "--step-cache-warmup", 3)
    said = draw(*words, steps=12, out=out)
    assert said.code == 0
    [told] = [line for line in said.err if "step cache" in line]
    assert "note: step cache: blocks were skipped in " in told
    settings = read_settings(out)["step_cache"]
    assert {name: settings[name] for name in ("threshold", "max_skips", "warmup")} == {
        "threshold": 1.0, "max_skips": 2, "warmup": 3
    }  # fmt: skip
    assert f"in {len(settings['skipped'])} of 12 steps ({', '.join(map(str, settings['skipped']))})" in told
    [written] = json.loads(out.with_suffix(".json").read_text())["pictures"]
    assert written["settings"]["step_cache"] == settings


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        (("--step-cache", 0.1), 8, "with 8 steps every one changes much"),
        (("--step-cache", -1), 12, "the step cache's threshold is -1.0; give a number from 0 to 1"),
        (("--step-cache", 0.1, "--step-cache-skips", 0), 12, "max_skips is 0"),
        (("--step-cache-warmup", 3), 12, "give --step-cache 0.1"),
    ],
)
def test_a_step_cache_that_cannot_be_is_refused(draw, tmp_path, words, steps, message):
    said = draw(*words, steps=steps, out=tmp_path / "a.png")
    assert said.code != 0
    assert message in " ".join(said.err)
    assert not (tmp_path / "a.png").exists()
