"""Runs a model while another process cuts its file, and ends with a sentence.

``cut.py FILE resident|packed|streamed|decoding``: the file is cut at no particular moment, in the middle of whatever is
computed then.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from flux.errors import UserError
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.parts import open_autoencoder, open_transformer
from flux.pipelines.prompts import EncodedPrompt

NOISE = torch.ones(1, 16, 8, 8)
STEPS = 20_000  # far more than are taken
CPU = torch.device("cpu")
CUT = "import os, sys; os.truncate(sys.argv[1], os.stat(sys.argv[1]).st_size // 20)"
WAYS = {"resident": ("numbers", None), "packed": ("packed", None), "streamed": ("numbers", 0)}


def main(path: Path, way: str) -> int:
    cutters: list[subprocess.Popen[bytes]] = []

    def cut(*_: object) -> None:
        if not cutters:
            cutters.append(subprocess.Popen([sys.executable, "-c", CUT, str(path)]))

    try:
        run(path, way, cut)
    except UserError as error:
        began = time.monotonic()
        cutters[0].wait(30)  # who waited for us is let go
        sys.stdout.write(f"{time.monotonic() - began:.1f}\n")
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run(path: Path, way: str, cut: object) -> None:
    torch.set_num_threads(1)
    if way == "decoding":
        part = open_autoencoder(path, CPU, torch.float32)
        with torch.inference_mode(), part.resident() as autoencoder:
            for _ in range(STEPS):
                autoencoder.decode(NOISE)
                cut()
        return
    keep, limit = WAYS[way]
    part = open_transformer(path, CPU, torch.float32, keep=keep)
    sigmas = torch.linspace(1, 0, STEPS + 1).tolist()
    prompt = EncodedPrompt(torch.ones(1, 9, part.spec.context_width), torch.ones(1, part.spec.pooled_width))
    denoise(part, prompt, NOISE, sigmas, guidance=3.0, limit=limit, hooks=Hooks(preview=cut), tables=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
