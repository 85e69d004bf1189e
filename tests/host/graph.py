"""Prompts in the server's format: small ones built in code, and workflow files turned into them."""

from __future__ import annotations

from typing import Any

from pictures import PROMPT

Prompt = dict[str, dict[str, Any]]
Link = list[Any]

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
NOT_RUN = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
MUTED, BYPASSED = 2, 4
STEPS = 16  # that the embedded model takes


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def start(model: str = "mini", text: str = PROMPT) -> Prompt:
    """Our loaders, the core's text and latent nodes."""
    return {
        "load": node("FluxFoundryLoadEmbedded", model=model),
        "encode": node("CLIPTextEncode", clip=["load", 1], text=text),
        "text": node("FluxGuidance", conditioning=["encode", 0], guidance=3.0),
        "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
    }


def end(latent: str = "sample", decoder: str = "VAEDecode") -> Prompt:
    """To a saved picture."""
    names = {"VAEDecode": "samples", "FluxFoundryDecode": "latent"}
    return {
        "decode": node(decoder, vae=["load", 2], **{names[decoder]: [latent, 0]}),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }


def core_sampler(model: str = "load", **changes: object) -> dict:
    settings = {"seed": 7, "steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    wires = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return node("KSampler", model=[model, 0], **{**wires, **settings, **changes})


def our_sampler(model: str = "load", **changes: object) -> dict:
    settings = {"seed": 7, "steps": STEPS, "guidance": 0.0, "schedule": "flux", "solver": "euler", "denoise": 1.0}
    wires = {"positive": ["text", 0], "latent": ["empty", 0]}
    return node("FluxFoundrySampler", model=[model, 0], **{**wires, **settings, **changes})


def to_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> Prompt:
    """A workflow file as a prompt.

    Args:
        workflow: A graph in the front end's format, without subgraphs.
        info: The server's ``/object_info``, which says in which order a node's widgets stand.
    """
    assert not workflow.get("definitions", {}).get("subgraphs"), "subgraphs are not converted here"
    nodes = {n["id"]: n for n in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for n in nodes.values():
        if n["type"] in NOT_RUN or n.get("mode", 0) in (MUTED, BYPASSED):
            continue
        inputs = widget_inputs(n, info[n["type"]])
        for socket in n.get("inputs", ()):
            if socket.get("link") is not None:
                inputs[socket["name"]] = _source(links[socket["link"]], nodes, links)
        prompt[str(n["id"])] = node(n["type"], **inputs)
    return prompt


def widget_inputs(n: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by name."""
    values = n.get("widgets_values") or []
    if isinstance(values, dict):
        return dict(values)
    found, rest = {}, list(values)
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if not _has_widget(spec[0], options) or not rest:
                continue
            found[name] = rest.pop(0)
            if _has_second_widget(name, options) and rest:
                rest.pop(0)
    assert not rest, f"{n['type']}: {rest} belong to no widget"
    return found


def _has_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def _has_second_widget(name: str, options: dict[str, Any]) -> bool:
    """Whether the front end puts a control behind it: what to do with a seed after a run, or an upload button."""
    return bool(options.get("control_after_generate") or name in SEEDS or options.get("image_upload"))


def _source(link: Link, nodes: dict[int, dict[str, Any]], links: dict[int, Link]) -> Link:
    """Where a link comes from, through reroutes."""
    origin, slot = nodes[link[1]], link[2]
    while origin["type"] == "Reroute":
        before = links[origin["inputs"][0]["link"]]
        origin, slot = nodes[before[1]], before[2]
    return [str(origin["id"]), slot]


def for_embedded(prompt: Prompt, text: str) -> Prompt:
    """The same graph at the embedded model's size, with its files in place of the real ones, and another prompt."""
    changed = {key: node(n["class_type"], **n["inputs"]) for key, n in prompt.items()}
    fast = any("schnell" in str(value) for n in prompt.values() for value in n["inputs"].values())
    for n in changed.values():
        for name, value in EMBEDDED.get(n["class_type"], {}).items():
            if name in n["inputs"] and not isinstance(n["inputs"][name], list):
                n["inputs"][name] = value(fast) if callable(value) else value
        if n["class_type"] in TEXT_NODES:
            n["inputs"][TEXT_NODES[n["class_type"]]] = text
    return changed


TEXT_NODES = {"FluxFoundryTextEncode": "prompt"}
EMBEDDED: dict[str, dict[str, Any]] = {
    "FluxFoundryLoadModel": {
        "model": lambda fast: "embedded: flux1-mini-schnell" if fast else "embedded: flux1-mini",
        "dtype": "auto",
    },
    "FluxFoundryLoadTextEncoders": {"clip_l": "embedded: clip-mini", "t5": "embedded: t5-mini"},
    "FluxFoundryLoadAutoencoder": {"vae": "embedded: flux1-mini-ae"},
    "FluxFoundryTextEncode": {"guidance": 3.0},
    "FluxFoundryEmptyLatent": {"aspect": "128x128 (embedded model)"},
    "FluxFoundrySampler": {"steps": lambda fast: 4 if fast else 16},
    "FluxFoundrySchedule": {"steps": lambda fast: 4 if fast else 16, "width": 128, "height": 128},
    "ImageScale": {"width": 128, "height": 128},
}
