"""``--prompt-cache`` spares the encoders, the record tells, and ``prompts`` lists and clears."""

from __future__ import annotations

import json

import pytest

from flux.pipelines.prompt_folder import kept_files


@pytest.fixture
def kept(draw, tmp_path):
    """Draws with a cache; gives the picture's bytes and what the record says of the cache."""

    def call(prompt="a red circle", folder="kept", **changes):
        said = draw(
            "--out", tmp_path / "a.png", "--record", "--prompt-cache", tmp_path / folder, prompt=prompt, **changes
        )
        assert said.code == 0, said.err
        return (tmp_path / "a.png").read_bytes(), json.loads((tmp_path / "a.json").read_text())["prompt_cache"]

    return call


def test_the_second_run_finds_what_the_first_one_kept(kept, draw, tmp_path):
    first, record = kept()
    assert record == {"found": 0, "encoded": 2}
    second, record = kept()
    assert record == {"found": 2, "encoded": 0}
    assert first == second
    assert draw("--out", tmp_path / "b.png", "--record").code == 0
    assert (tmp_path / "b.png").read_bytes() == first
    assert "prompt_cache" not in json.loads((tmp_path / "b.json").read_text())


def test_another_prompt_and_a_negative_one_are_encoded(kept):
    kept()
    assert kept("a star")[1] == {"found": 0, "encoded": 2}
    assert kept(negative="a star")[1] == {"found": 4, "encoded": 0}


def test_a_folder_that_is_a_file_is_refused(draw, tmp_path):
    (tmp_path / "kept").write_text("")
    said = draw("--out", tmp_path / "a.png", "--prompt-cache", tmp_path / "kept")
    assert said.code == 2
    assert "is a file; name a folder for the embeddings of prompts" in said.err[0]


def test_a_damaged_file_is_noted_and_the_picture_drawn(kept, draw, tmp_path):
    first, _ = kept()
    for entry in kept_files(tmp_path / "kept"):
        entry.path.write_bytes(b"")
    said = draw("--out", tmp_path / "a.png", "--prompt-cache", tmp_path / "kept")
    assert sum("a prompt is encoded again" in line for line in said.err) == 2
    assert (tmp_path / "a.png").read_bytes() == first


def test_a_folder_is_listed_and_cleared(kept, flux, tmp_path):
    kept()
    kept("a star")
    said = flux("prompts", tmp_path / "kept")
    assert [line.split()[:2] for line in said.out] == [["ENCODER", "PROMPTS"], ["clip-mini", "2"], ["t5-mini", "2"]]
    facts = json.loads("\n".join(flux("prompts", tmp_path / "kept", "--json").out))
    assert facts["encoders"] == {"clip-mini": 2, "t5-mini": 2}
    said = flux("prompts", tmp_path / "kept", "--clear")
    assert said.out[0].startswith("4 kept embeddings were removed, ")
    assert flux("prompts", tmp_path / "kept").out == [f"nothing is kept in {tmp_path / 'kept'}"]
    cleared = json.loads("\n".join(flux("prompts", tmp_path / "kept", "--clear", "--json").out))
    assert cleared == {"removed": 0, "bytes": 0}


def test_a_folder_that_is_not_there_is_told(flux, tmp_path):
    said = flux("prompts", tmp_path / "absent", "--clear")
    assert said.code == 2
    assert "there is no folder" in said.err[0]
