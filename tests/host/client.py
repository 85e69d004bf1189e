"""A ComfyUI in a process of its own, spoken to over HTTP as any client does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACK = "fluxfoundry"
START_SECONDS = 300
RUN_SECONDS = 300
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras")
FOLDERS = ("custom_nodes", "input", "output", "temp", "user", *(f"models/{name}" for name in MODEL_FOLDERS))
Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a prompt ended: ``success``, ``error`` or ``interrupted``; what each output node gave; the error's words."""

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    error_node: str = ""

    def report(self) -> dict[str, Any]:
        """What the only ProbeCompare said."""
        [report] = [json.loads(out["report"][0]) for out in self.outputs.values() if "report" in out]
        return report


class RefusedError(Exception):
    """The server did not take a prompt."""


class Host:
    """A running ComfyUI."""

    def __init__(self, url: str, base: Path, python: str) -> None:
        self.url, self.base, self.python = url, base, python

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, body: object) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from error

    def queue(self, prompt: Prompt, client: str = "tests") -> str:
        """Queue a prompt; gives its id."""
        return self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = RUN_SECONDS) -> Outcome:
        """Wait for a prompt's end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _outcome(entry)
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not end within {seconds} s")

    def run(self, prompt: Prompt, client: str = "tests") -> Outcome:
        """Run a prompt to its end, whatever that is."""
        return self.wait(self.queue(prompt, client))

    def succeed(self, prompt: Prompt) -> Outcome:
        """Run a prompt that has to succeed."""
        outcome = self.run(prompt)
        assert outcome.status == "success", outcome.error
        return outcome

    def picture(self, prompt: Prompt) -> bytes:
        """Run a prompt; gives its only saved picture as PNG."""
        [png] = self.pictures(prompt)
        return png

    def pictures(self, prompt: Prompt) -> list[bytes]:
        """Run a prompt; gives every saved picture as PNG."""
        outcome = self.succeed(prompt)
        return self.pictures_of(outcome, *outcome.outputs, kind="output")

    def pictures_of(self, outcome: Outcome, *names: str, kind: str | None = None) -> list[bytes]:
        """The pictures that nodes gave, node by node, as PNG; ``kind`` is "output" for saved ones, "temp" for shown."""
        images = [image for name in names for image in outcome.outputs[name].get("images", ())]
        return [self.get("/view?" + urllib.parse.urlencode(one)) for one in images if kind in (None, one["type"])]

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """A client whose messages are noted."""
        client = uuid.uuid4().hex
        script = str(Path(__file__).with_name("listen.py"))
        command = [self.python, script, self.url, client]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["type"] == "status"
            try:
                yield Listener(client, process)
            finally:
                process.kill()


class Listener:
    """Messages to one client, in the order in which they came."""

    def __init__(self, client: str, process: subprocess.Popen[str]) -> None:
        self.client, self._process = client, process
        self.seen: list[dict[str, Any]] = []

    def until(self, *types: str) -> dict[str, Any]:
        """Read up to the first message of one of these types."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(json.loads(line))
            if self.seen[-1]["type"] in types:
                return self.seen[-1]
        raise AssertionError(f"the connection ended before any of {types}")


def _outcome(entry: dict[str, Any]) -> Outcome:
    messages = dict(entry["status"]["messages"])
    if "execution_interrupted" in messages:
        return Outcome("interrupted", entry["outputs"])
    error = messages.get("execution_error", {})
    status = "error" if error else "success"
    return Outcome(status, entry["outputs"], error.get("exception_message", "").strip(), error.get("node_type", ""))


def find_comfyui() -> Path | None:
    """The ComfyUI that ``COMFYUI_PATH`` names, or the one whose custom_nodes the pack stands in."""
    named = os.environ.get("COMFYUI_PATH")
    place = Path(named) if named else ROOT.parent.parent
    return place if (place / "main.py").is_file() and (place / "comfy").is_dir() else None


def prepare(base: Path) -> None:
    """A base directory with the pack, the probes, and a copy of the embedded transformers as models of the user's."""
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True)
    shutil.copytree(Path(__file__).with_name("probe"), base / "custom_nodes" / "probe")
    pack = base / "custom_nodes" / PACK
    try:
        pack.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows asks for a privilege
        shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".git", ".venv", "out", "tests"))
    for name in ("flux1-mini", "flux1-mini-schnell"):
        shutil.copy(ROOT / "flux" / "mini" / "weights" / f"{name}.safetensors", base / "models" / "diffusion_models")


@contextlib.contextmanager
def serve(comfyui: Path, base: Path, *more: str) -> Iterator[Host]:
    """Start a ComfyUI on the CPU, with more flags, wait until it answers, and stop it in the end."""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    port = _free_port()
    flags = ["--cpu", "--disable-api-nodes", "--disable-auto-launch", "--preview-method", "latent2rgb"]
    places = [
        "--database-url",
        f"sqlite:///{base / 'user' / 'comfyui.db'}",
        "--base-directory",
        str(base),
        "--port",
        str(port),
    ]
    log = base / "log.txt"
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with log.open("w") as out:
        command = [python, "main.py", *flags, *more, *places]
        process = subprocess.Popen(command, cwd=comfyui, stdout=out, stderr=subprocess.STDOUT, env=quiet)
    host = Host(f"http://127.0.0.1:{port}", base, python)
    try:
        _wait_for_answer(host, process, log)
        yield host
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for_answer(host: Host, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            host.get("/system_stats")
            return
        time.sleep(0.3)
    raise RuntimeError(f"ComfyUI did not start:\n{log.read_text()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
