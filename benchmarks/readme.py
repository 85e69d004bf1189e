"""Put the tables of ``benchmarks/tables`` into the README: ``python -m benchmarks.readme``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "prompts": "Does the embedded model draw what the prompt says?",
    "guided": "Do the embedded guided models do what they are there for?",
    "embedded": "The embedded files",
    "fidelity": "What each storage format costs",
    "startup": "How long it takes",
    "opening": "Opening the largest file",
    "decoding": "Unpacking weights on the CPU",
    "transformer": "Beside diffusers and ComfyUI",
    "batches": "Several pictures at once",
    "streaming": "What streaming costs",
    "planned": "Plans beside what runs take",
    "step_cache": "What a step cache saves and costs",
    "compiled": "What compiling brings",
    "real_size": "A FLUX.1 of real size on the CPU",
    "gpu": "On a GPU",
}
BETWEEN = re.compile(r"(<!-- tables:begin.*?-->\n).*?(<!-- tables:end -->)", re.DOTALL)


def main() -> int:
    """Rewrite the part between the marks."""
    tables = ROOT / "benchmarks" / "tables"
    parts = []
    for name, title in TITLES.items():
        path = tables / f"{name}.md"
        if path.exists():
            parts.append(f"### {title}\n\n{path.read_text(encoding='utf-8').strip()}\n")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    body = "\n".join(parts)
    readme.write_text(BETWEEN.sub(lambda found: f"{found[1]}{body}{found[2]}", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
