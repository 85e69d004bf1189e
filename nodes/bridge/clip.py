"""FLUX.1's two text encoders as the host's CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import folder_paths
import torch
from torch import Tensor, nn

from ...flux.memory.policy import Policy
from ...flux.mini.files import MINI as MINI_FILES
from ...flux.models.text.clip import ClipText
from ...flux.models.text.t5 import T5Encoder
from ...flux.pipelines.prompts import cut_sentences
from ...flux.specs.fit import Given
from ...flux.specs.text import CLIP_MINI, T5_MINI, ClipTextSpec, T5Spec
from ...flux.weights.packed import Packed
from ...flux.weights.readers.stamps import FileStamp
from ...flux.weights.readers.tokenizer import (
    ClipTokenizer,
    T5Tokenizer,
    TokenIds,
    read_clip_tokenizer,
    read_t5_tokenizer,
)
from .compat import forget, patch, register_reload, streams_files, to_intermediate
from .noting import noted_encoder
from .packed import pack_layers, packed_state
from .preflight import ENCODERS
from .progress import say
from .residents import FoundryPatcher, Residents, under_policy
from .weights import HOSTS, HostLayers, Numbers, encoder_numbers, open_weights

__all__ = ["HostTextEncoders", "HostTokenizer", "load_clip", "real_or_embedded_tokenizers"]

WeightedTokens = list[tuple[int, float]]
Packings = Mapping[str, Packed]
TITLES = {"l": "CLIP-L", "t5xxl": "T5"}
NAMES = {"l": "clip_l", "t5xxl": "t5xxl"}  # the host's names of tokens, and of modules (LoRA nodes look for these)


class HostTokenizer:
    """Both tokenizers behind the host's interface, with its prompt weights.

    Args:
        clip: CLIP's tokenizer.
        t5: T5's.
        t5_length: Tokens that T5's text is padded to.
    """

    def __init__(self, clip: ClipTokenizer, t5: T5Tokenizer, t5_length: int) -> None:
        self.clip, self.t5, self.t5_length = clip, t5, t5_length

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, cut_told_of: Sequence[str] = ("l", "t5xxl"), **_: Any
    ) -> dict[str, list[list[tuple[Any, ...]]]]:
        """Token ids with weights for each encoder; ``(a:1.2)`` sets the weight of a.

        Args:
            text: The prompt.
            return_word_ids: Whether each token carries a word number as well, as the host asks of its own.
            cut_told_of: The encoders whose cut text the user is told of.
        """
        frames = {
            "l": (self.clip, self.clip.frame, 1),
            "t5xxl": (self.t5, partial(self.t5.frame, length=self.t5_length), 0),
        }
        tokens, framed = {}, {}
        for name, (tokenizer, frame, before) in frames.items():
            tokens[name], framed[name] = self._weigh(text, tokenizer, frame, before, return_word_ids)
        read = {name: ids if name in cut_told_of else None for name, ids in framed.items()}
        if told := cut_sentences(TITLES["l"], read["l"], TITLES["t5xxl"], read["t5xxl"]):
            say("; ".join(told))
        return {name: [pairs] for name, pairs in tokens.items()}

    def _weigh(
        self, text: str, tokenizer: ClipTokenizer | T5Tokenizer, frame: Any, before: int, word_ids: bool
    ) -> tuple[list[tuple[Any, ...]], TokenIds]:
        segments = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        ids: list[int] = []
        weights: list[float] = []
        for segment, weight in segments:
            pieces = tokenizer.pieces(comfy.sd1_clip.unescape_important(segment))
            ids += pieces
            weights += [weight] * len(pieces)
        framed: TokenIds = frame(ids)
        weights = [1.0] * before + weights[: framed.used - 1 - before]
        weights += [1.0] * (len(framed.ids) - len(weights))
        pairs = zip(framed.ids, weights, strict=True)
        return [(*pair, 0) if word_ids else pair for pair in pairs], framed

    def untokenize(self, tokens: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        return [(token, self.t5.token(token[0])) for token in tokens]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(self.t5.token(token) for token in token_ids)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class HostTextEncoders(nn.Module):
    """CLIP-L and T5 behind the host's interface of a text model."""

    def __init__(self, clip: nn.Module, t5: nn.Module, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        for name, module in (("clip_l", clip), ("t5xxl", t5)):
            holder = nn.Module()
            holder.transformer = module
            setattr(self, name, holder)
        self.dtypes = dtypes
        self.execution_device: torch.device | None = None
        self.given: tuple[Given, ...] = ()
        self.stamps: dict[Path, FileStamp] = {}

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the device to run on. Layers cannot be chosen: FLUX.1 uses the last of both."""
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def encode_token_weights(
        self, tokens: dict[str, list[WeightedTokens]]
    ) -> tuple[Tensor, Tensor, dict[str, tuple[Given, ...]]]:
        """T5's tokens (1, T, width), CLIP's pooled vector (1, width), and the files that made them."""
        device = self.execution_device or comfy.model_management.text_encoder_device()
        clip_ids = torch.tensor([[token for token, _ in tokens["l"][0]]], device=device)
        clip_file, t5_file = self.given
        with noted_encoder("clip", self, self.clip_l, clip_file, device) as meter:
            _, pooled = self.clip_l.transformer(clip_ids)
            meter.tick()
        with noted_encoder("t5", self, self.t5xxl, t5_file, device) as meter:
            encoded = to_intermediate(self._encode_t5(tokens["t5xxl"][0], device))
            meter.tick()
        return encoded, to_intermediate(pooled), {ENCODERS: self.given}

    def _encode_t5(self, tokens: WeightedTokens, device: torch.device) -> Tensor:
        """Encode, and move weighted tokens away from, or towards, what an empty prompt gives at their place."""
        t5 = self.t5xxl.transformer
        weights = torch.tensor([weight for _, weight in tokens], device=device)
        out: Tensor = t5(torch.tensor([[token for token, _ in tokens]], device=device))
        if bool((weights == 1).all()):
            return out
        empty = [t5.spec.eos] + [t5.spec.pad] * (len(tokens) - 1)
        base = t5(torch.tensor([empty], device=device))
        return torch.where(weights[:, None] == 1, out, base + (out - base) * weights[:, None])

    def load_sd(self, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Load either encoder's weights, from a file in its single-file layout."""
        own = self.clip_l if any(name.startswith("text_model.") for name in state) else self.t5xxl
        missing, unexpected = own.transformer.load_state_dict(state, strict=False, assign=True)
        self.requires_grad_(False)
        return list(missing), list(unexpected)


def load_clip(clip_path: str, t5_path: str, t5_length: int = 512, memory: Policy = HOSTS) -> Any:
    """Load both text encoders as the host's CLIP.

    Args:
        clip_path: CLIP-L's file.
        t5_path: T5's file.
        t5_length: Tokens that T5's text is padded to; embedded encoders have a length of their own.
        memory: How much of them may stay on the device; with any but "auto" weights stay as they are stored.

    Raises:
        UserError: A file is missing, damaged, or another encoder than it should be.
    """
    parts = (open_weights(Path(clip_path), "clip"), open_weights(Path(t5_path), "t5"))
    specs = [weights.spec for weights in parts]
    device = comfy.model_management.text_encoder_device()
    numbers = [encoder_numbers(weights, device) for weights in parts]
    target = comfy.supported_models_base.ClipTarget(partial(real_or_embedded_tokenizers, *specs, t5_length), _build)
    packed = [weights.packed(weights.chosen_layers(memory)) for weights in parts]
    target.params = {"parts": tuple(zip(specs, numbers, packed, strict=True))}
    offload = comfy.model_management.text_encoder_offload_device()
    result = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weights.parameters for weights in parts),
        state_dict=[
            weights.read(own.weights, without=layers, streamed=streams_files()) | packed_state(layers, device)
            for weights, own, layers in zip(parts, numbers, packed, strict=True)
        ],
        model_options={"initial_device": offload} if offload != device else {},
    )
    result.cond_stage_model.given = tuple(weights.given for weights in parts)
    result.cond_stage_model.stamps = {path: own for weights in parts for path, own in weights.stamps.items()}
    if any(packed):
        holders = result.cond_stage_model.named_children()
        under_policy(result.cond_stage_model, [
            Residents(holder.transformer, f"{name}.transformer.", weights, own.compute, memory, (), device)
            for (name, holder), weights, own, layers in zip(holders, parts, numbers, packed, strict=True) if layers
        ])  # fmt: skip
        result.patcher = _packed_patcher(result.patcher)
    register_reload(result.patcher, load_clip_patcher, clip_path, t5_path, t5_length, memory)
    return result


def load_clip_patcher(
    clip_path: str, t5_path: str, t5_length: int, memory: Policy, disable_dynamic: bool = False
) -> Any:
    """The patcher of ``load_clip``, which the host asks for when it loads the encoders again."""
    patcher = load_clip(clip_path, t5_path, t5_length, memory).patcher
    if isinstance(patcher, FoundryPatcher) or not disable_dynamic:
        return patcher
    return patch(patcher.model, patcher.load_device, patcher.offload_device, plain=True)


def _packed_patcher(patcher: Any) -> FoundryPatcher:
    """In place of the patcher that the host gave its CLIP, and may have loaded, one for packed layers."""
    forget(patcher)
    own = FoundryPatcher(patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device)
    own.object_patches, own.force_cast_weights = patcher.object_patches, patcher.force_cast_weights
    own.hook_mode, own.is_clip = patcher.hook_mode, patcher.is_clip
    return own


def _build(
    parts: tuple[tuple[ClipTextSpec, Numbers, Packings], tuple[T5Spec, Numbers, Packings]], **_: Any
) -> HostTextEncoders:
    """Both modules, without weights, of layers that cast or unpack theirs."""
    (clip_spec, clip_numbers, clip_packed), (t5_spec, t5_numbers, t5_packed) = parts
    clip = ClipText(clip_spec, HostLayers(comfy.ops.manual_cast, clip_numbers))
    t5 = T5Encoder(t5_spec, HostLayers(comfy.ops.manual_cast, t5_numbers))
    pack_layers(clip, clip_packed, clip_numbers.weights, clip_numbers.compute)
    pack_layers(t5, t5_packed, t5_numbers.weights, t5_numbers.compute)
    module = HostTextEncoders(clip, t5, {clip_numbers.weights, t5_numbers.weights})
    return module.eval().requires_grad_(False)


def real_or_embedded_tokenizers(clip_spec: ClipTextSpec, t5_spec: T5Spec, t5_length: int, **_: Any) -> HostTokenizer:
    """Tokenizers of the embedded model, or the host's own files for real encoders."""
    host = Path(comfy.sd1_clip.__file__).parent
    own = MINI_FILES.tokenizer
    clip_path = own if clip_spec == CLIP_MINI else host / "sd1_tokenizer"
    t5_path = own if t5_spec == T5_MINI else host / "text_encoders" / "t5_tokenizer" / "tokenizer.json"
    length = min(t5_length, t5_spec.length)
    return HostTokenizer(read_clip_tokenizer(clip_path, clip_spec), read_t5_tokenizer(t5_path, t5_spec), length)
