"""Parts bound to their files: in what format they run."""

from __future__ import annotations

import pytest
import torch

from flux.pipelines import parts
from flux.pipelines.parts import open_autoencoder, open_t5, open_transformer
from tests.tiny import write_tiny


@pytest.mark.parametrize(
    ("fast", "autoencoder"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_the_autoencoder_never_runs_in_fp16_unless_it_is_asked_to(tmp_path, monkeypatch, fast, autoencoder):
    """A card without bf16 is fast in fp16, whose range FLUX.1's autoencoder leaves."""
    files, device = write_tiny(tmp_path), torch.device("cpu")
    monkeypatch.setattr(parts, "fast_dtype", lambda _: fast)
    monkeypatch.setattr(parts, "compute_dtype", lambda _, parameters: fast)
    assert open_autoencoder(files.autoencoder, device).dtype == autoencoder
    assert open_autoencoder(files.autoencoder, device, torch.float16).dtype == torch.float16
    assert open_transformer(files.transformer, device).dtype == open_t5(files.t5, device).dtype == fast
