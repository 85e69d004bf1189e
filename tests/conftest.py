"""Makes ``flux`` importable from wherever pytest was started; skips what needs a GPU where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# The models of these tests are tiny: threads cost more than they bring, above all on a busy machine (68 s against 12).
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU found")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(params=[False, True], ids=["gradients", "inference"])
def as_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test once as training runs, and once as the engine does, which has faster ways of its own there."""
    with torch.inference_mode(request.param):
        yield
