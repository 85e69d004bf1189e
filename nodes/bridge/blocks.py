"""The transformer's blocks one by one, with what other nodes may put between them: replaced blocks and ControlNets.

Without any of it ``Flux1.forward`` is run instead; both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...flux.models.flux1 import Conditions, Flux1, Modulations
from ...flux.models.positions import rope
from .progress import check_cancelled

__all__ = ["is_patched", "run_patched"]

Options = dict[str, Any]


def is_patched(options: Options, control: Options | None) -> bool:
    """Whether anything is to be done between the blocks."""
    return control is not None or bool(options.get("patches_replace", {}).get("dit"))


def run_patched(
    model: Flux1,
    tokens: Tensor,
    conditions: Conditions,
    modulations: Modulations,
    vector: Tensor,
    control: Options | None,
    options: Options,
) -> Tensor:
    """``Flux1.forward`` with patches.

    Args:
        model: The transformer.
        tokens: Image tokens.
        conditions: Text and positions.
        modulations: Of this moment.
        vector: What the modulations were made from; only shown to patches.
        control: A ControlNet's residuals, ``input`` for double and ``output`` for single blocks.
        options: The host's transformer options; what patches read of the current block is set in them.
    """
    run = _Run(model, modulations, vector, control or {}, options)
    img, txt = model.img_in(tokens), model.txt_in(conditions.text)
    ids = torch.cat((conditions.text_ids, conditions.image_ids))
    rotation = rope(ids, model.spec.axes, model.spec.theta)
    for index in range(len(model.double_blocks)):
        img, txt = run.double(index, img, txt, rotation)
    length = txt.shape[1]
    x = torch.cat((txt, img), dim=1)
    options["img_slice"] = [length, x.shape[1]]
    for index in range(len(model.single_blocks)):
        x = run.single(index, x, rotation, length)
    out: Tensor = model.final_layer(x[:, length:], modulations.final)
    return out


class _Run:
    """One pass: what every block needs, and the patches on it."""

    def __init__(
        self, model: Flux1, modulations: Modulations, vector: Tensor, control: Options, options: Options
    ) -> None:
        self.model, self.modulations, self.vector = model, modulations, vector
        self.control, self.options = control, options
        self.replaced = options.get("patches_replace", {}).get("dit", {})

    def double(self, index: int, img: Tensor, txt: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        block = self.model.double_blocks[index]
        own = (self.modulations.image[index], self.modulations.text[index])

        def original(args: Options) -> Options:
            image, text = block(args["img"], args["txt"], rotation, *own)
            return {"img": image, "txt": text}

        out = self._call("double", index, {"img": img, "txt": txt}, rotation, original)
        return self._add("input", index, out["img"], 0), out["txt"]

    def single(self, index: int, x: Tensor, rotation: Tensor, length: int) -> Tensor:
        block, own = self.model.single_blocks[index], self.modulations.single[index]

        def original(args: Options) -> Options:
            return {"img": block(args["img"], rotation, own)}

        out = self._call("single", index, {"img": x}, rotation, original)
        return self._add("output", index, out["img"], length)

    def _call(self, kind: str, index: int, args: Options, rotation: Tensor, original: Any) -> Options:
        check_cancelled()
        blocks = self.model.double_blocks if kind == "double" else self.model.single_blocks
        self.options |= {"block_type": kind, "block_index": index, "total_blocks": len(blocks)}
        replaced = self.replaced.get((f"{kind}_block", index))
        if replaced is None:
            return original(args)
        args |= {"vec": self.vector, "pe": rotation, "attn_mask": None, "transformer_options": self.options}
        out: Options = replaced(args, {"original_block": original})
        return out

    def _add(self, side: str, index: int, tokens: Tensor, start: int) -> Tensor:
        """Add the ControlNet's residual of a block to the image tokens, which begin at ``start``."""
        residuals = self.control.get(side) or ()
        residual = residuals[index] if index < len(residuals) else None
        if residual is None:
            return tokens
        end = start + residual.shape[1]
        return torch.cat((tokens[:, :start], tokens[:, start:end] + residual, tokens[:, end:]), dim=1)
