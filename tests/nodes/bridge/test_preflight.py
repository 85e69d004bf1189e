"""Pictures that another model's autoencoder encoded are told before a run, in whatever order nodes put them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from fake_host import Vae

from flux.mini.files import MINI
from tests.fixtures.listings import LISTINGS
from tests.tiny import write_header_only


@pytest.fixture
def preflight(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("nodes.bridge.preflight")
    monkeypatch.setattr(module, "users_files", lambda kinds: [])
    return module


def vae_of(preflight: ModuleType, path: Path) -> Vae:
    vae = Vae()
    [vae.given] = preflight.given_files([path])
    return vae


def test_an_autoencoder_that_is_not_the_models_is_refused(preflight: ModuleType, tmp_path: Path) -> None:
    real = tmp_path / "ae.safetensors"
    write_header_only(real, LISTINGS["flux1-ae"][1])
    [mini] = preflight.given_files([MINI.transformer])
    preflight.check_together(mini, preflight.files_of(preflight.encoded_by(vae_of(preflight, MINI.autoencoder), {})))
    with pytest.raises(Exception, match=r"ae\.safetensors"):
        preflight.check_together(mini, preflight.files_of(preflight.encoded_by(vae_of(preflight, real), {})))


def test_each_is_noted_once_and_in_any_order(preflight: ModuleType, tmp_path: Path) -> None:
    real = tmp_path / "ae.safetensors"
    write_header_only(real, LISTINGS["flux1-ae"][1])
    one, other = vae_of(preflight, MINI.autoencoder), vae_of(preflight, real)
    both = preflight.encoded_by(other, preflight.encoded_by(one, preflight.encoded_by(one, {"guidance": 3.0})))
    assert len(preflight.files_of(both)) == 2
    assert both == preflight.encoded_by(one, preflight.encoded_by(other, {"guidance": 3.0}))
    assert preflight.encoded_by(Vae(), {"guidance": 3.0}) == {"guidance": 3.0}
