"""The transformer's blocks one by one, with what other nodes may put between and into them.

That is: replaced blocks, ControlNets, patches after the input layers, patches before and behind attention, and another
attention altogether. Without any of it ``Flux1.forward`` is run instead; blocks that change nothing give its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.flux.math import attention as host_attention
from torch import Tensor

from ...flux.errors import MismatchError
from ...flux.models.flux1 import Attend, Conditions, Flux1, Modulations, RotaryAttention, Shortcut
from ...flux.models.positions import rope
from ...flux.ops.attention import Kernel
from ...flux.ops.dtypes import clamp_to_range
from .progress import check_cancelled
from .references import as_bias

__all__ = ["is_patched", "run_patched"]

Options = dict[str, Any]
Blocks = Callable[[Options], Options]

BEFORE_BLOCKS = "post_input"
BEFORE_ATTENTION, BEHIND_ATTENTION = "attn1_patch", "attn1_output_patch"
OTHER_ATTENTION = "optimized_attention_override"


def is_patched(options: Options, control: Options | None) -> bool:
    """Whether anything is to be done between the blocks or in them."""
    return (
        control is not None
        or bool(options.get("patches_replace", {}).get("dit"))
        or bool(options.get("patches", {}).get(BEFORE_BLOCKS))
        or _touches_attention(options)
    )


def _touches_attention(options: Options) -> bool:
    patches = options.get("patches", {})
    return OTHER_ATTENTION in options or bool(patches.get(BEFORE_ATTENTION)) or bool(patches.get(BEHIND_ATTENTION))


def run_patched(
    model: Flux1,
    tokens: Tensor,
    conditions: Conditions,
    modulations: Modulations,
    vector: Tensor,
    control: Options | None,
    options: Options,
    kernel: Kernel,
    shortcut: Shortcut | None = None,
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
        kernel: What computes attention that no patch touches.
        shortcut: See ``Flux1.forward``. What was done to blocks that it stands in for is done as it was the last time.
    """
    img, txt, ids = _after_input(model, tokens, conditions, options)
    length = txt.shape[1]
    options["img_slice"] = [length, length + img.shape[1]]
    run = _Run(model, modulations, vector, ids, _for_host(conditions.bias, img), control or {}, options, kernel)
    before = img
    img, txt = run.double(0, img, txt)
    last = None if shortcut is None else shortcut.recall(before, img)
    if last is None:
        del before
        for index in range(1, len(model.double_blocks)):
            img, txt = run.double(index, img, txt)
        x = torch.cat((txt, img), dim=1)
        for index in range(len(model.single_blocks)):
            x = run.single(index, x, length)
        last = x[:, length:]
        if shortcut is not None:
            shortcut.remember(last)
    out: Tensor = model.final_layer(last[:, : tokens.shape[1]], modulations.final)
    return out


def _after_input(
    model: Flux1, tokens: Tensor, conditions: Conditions, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text as the blocks take them, and the positions (L, 3) of both, text first.

    Patches may change all of them, and add tokens; they see positions with a batch dimension.
    """
    img, txt = model.img_in(tokens), model.txt_in(conditions.text)
    image_ids, text_ids = (ids[None].expand(len(img), -1, -1) for ids in (conditions.image_ids, conditions.text_ids))
    state = {"img": img, "txt": txt, "img_ids": image_ids, "txt_ids": text_ids}
    for patch in options.get("patches", {}).get(BEFORE_BLOCKS, ()):
        state = patch({**state, "transformer_options": options})
    return state["img"], state["txt"], torch.cat((state["txt_ids"][0], state["img_ids"][0]))


def _for_host(bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias (B, 1, L, L) in the host's form (B, L, L), of the tokens' type."""
    return None if bias is None else bias[:, 0].to(like.dtype)


def _by_head(bias: Tensor) -> Tensor:
    """A bias in any of the host's forms, (L, L), (B, L, L) or (B, H, L, L), as the last."""
    return bias[:, None] if bias.ndim == 3 else bias


class _Run:
    """One pass: what every block needs, and the patches on it."""

    def __init__(
        self,
        model: Flux1,
        modulations: Modulations,
        vector: Tensor,
        ids: Tensor,
        bias: Tensor | None,
        control: Options,
        options: Options,
        kernel: Kernel,
    ) -> None:
        self.model, self.modulations, self.vector, self.bias = model, modulations, vector, bias
        self.control, self.options, self.kernel = control, options, kernel
        self.replaced = options.get("patches_replace", {}).get("dit", {})
        spec = model.spec
        self.rotation = rope(ids, spec.axes, spec.theta)
        # The host's form of the same rotation: patches expect it, and its attention takes it.
        self.host_rotation = EmbedND(spec.hidden // spec.heads, int(spec.theta), list(spec.axes))(ids[None])
        self.is_hosts = _touches_attention(options)

    def double(self, index: int, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        block = self.model.double_blocks[index]
        own = (self.modulations.image[index], self.modulations.text[index])

        def original(args: Options) -> Options:
            image, text = block(args["img"], args["txt"], self.rotation, *own, self._attend(args))
            return {"img": image, "txt": text}

        out = self._call("double", index, {"img": img, "txt": txt}, original)
        return self._add("input", index, clamp_to_range(out["img"]), 0), clamp_to_range(out["txt"])

    def single(self, index: int, x: Tensor, length: int) -> Tensor:
        block, own = self.model.single_blocks[index], self.modulations.single[index]

        def original(args: Options) -> Options:
            return {"img": block(args["img"], self.rotation, own, self._attend(args))}

        out = self._call("single", index, {"img": x}, original)
        return self._add("output", index, clamp_to_range(out["img"]), length)

    def _call(self, kind: str, index: int, args: Options, original: Blocks) -> Options:
        check_cancelled()
        blocks = self.model.double_blocks if kind == "double" else self.model.single_blocks
        self.options |= {"block_type": kind, "block_index": index, "total_blocks": len(blocks)}
        replaced = self.replaced.get((f"{kind}_block", index))
        if replaced is None:
            return original(args)
        args |= {
            "vec": self.vector,
            "pe": self.host_rotation,
            "attn_mask": self.bias,
            "transformer_options": self.options,
        }
        out: Options = replaced(args, {"original_block": original})
        return out

    def _attend(self, args: Options) -> Attend:
        """A block's attention, with the mask that it was given."""
        bias = args.get("attn_mask", self.bias)
        if self.is_hosts:
            return partial(self._host_attend, bias=bias)
        return RotaryAttention(None if bias is None else _by_head(as_bias(bias)), self.kernel)

    def _host_attend(self, q: Tensor, k: Tensor, v: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        """Attention (B, H, L, D) by the host, which rotates, with the patches before and behind it."""
        state: Options = {"q": q, "k": k, "v": v, "pe": self.host_rotation, "attn_mask": bias}
        patches, extra = self.options.get("patches", {}), dict(self.options)
        for patch in patches.get(BEFORE_ATTENTION, ()):
            q, k, v = (state[name] for name in "qkv")
            changed = patch(q, k, v, pe=state["pe"], attn_mask=state["attn_mask"], extra_options=extra)
            state |= {name: changed[name] for name in state if name in changed}
        q, k, v, pe, mask = state.values()
        mixed = host_attention(q, k, v, pe=pe, mask=mask, transformer_options=self.options)
        for patch in patches.get(BEHIND_ATTENTION, ()):
            mixed = patch(mixed, extra)
        heads: Tensor = mixed.unflatten(-1, (self.model.spec.heads, -1)).transpose(1, 2)
        return heads

    def _add(self, side: str, index: int, tokens: Tensor, start: int) -> Tensor:
        """Add the ControlNet's residual of a block to the image tokens, which begin at ``start``."""
        residuals = self.control.get(side) or ()
        residual = residuals[index] if index < len(residuals) else None
        if residual is None:
            return tokens
        if residual.shape[-1] != tokens.shape[-1]:
            raise MismatchError(
                f"the ControlNet gives tokens of width {residual.shape[-1]}, but this MODEL's have {tokens.shape[-1]}; "
                "choose a ControlNet that was made for it"
            )
        end = start + residual.shape[1]
        added = clamp_to_range(tokens[:, start:end] + residual.to(tokens))
        return torch.cat((tokens[:, :start], added, tokens[:, end:]), dim=1)
