"""Train Foundry Mini's text encoders to understand its language.

Real FLUX takes encoders that were trained on text alone; so does Mini. Its T5-like encoder learns to say at every token
what the object is that the token belongs to, with all its attributes; its CLIP-like tower learns to say in one vector
what the whole prompt wants. The heads that read this out are dropped afterwards.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.text.clip import ClipText
from ..models.text.t5 import SelfAttention, T5Encoder
from ..ops.dtypes import mixed_precision
from ..specs.text import CLIP_MINI, T5_MINI
from ..training.checkpoints import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from ..training.muon import Muon, split_parameters
from ..weights.readers.tokenizer import T5Tokenizer, read_clip_tokenizer, read_t5_tokenizer
from .language import (
    COLOURS,
    LETTERS,
    MAX_LETTERS,
    MAX_OBJECTS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Span,
    phrase,
    random_request,
    text_of,
)  # fmt: skip

__all__ = ["TextRecipe", "train_text_encoders"]

log = logging.getLogger(__name__)

IGNORED = -100  # cross entropy's mark for tokens without an answer
SIGN_SHARE = 0.4
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0
KINDS_WEIGHT = 4  # of the one loss that is a mean over many answers

# Questions asked at every T5 token, and the number of answers to each.
TOKEN_QUESTIONS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "position": len(POSITIONS) + 1,
    "count": MAX_OBJECTS + 1,
    "index": MAX_OBJECTS,
    "relation": 2 * len(RELATIONS) + 1,
    "background": len(COLOURS) + 1,
    "things": MAX_OBJECTS + 1,
    "letter": len(LETTERS) + 1,
    "place": MAX_LETTERS + 1,
    "length": MAX_LETTERS + 1,
}
# Questions asked of CLIP's pooled vector.
POOLED_QUESTIONS = {
    "background": len(COLOURS) + 1,
    "things": MAX_OBJECTS + 1,
    "length": MAX_LETTERS + 1,
    "word colour": len(COLOURS) + 1,
    **{f"letter {i}": len(LETTERS) + 1 for i in range(MAX_LETTERS)},
}
KINDS = len(COLOURS) * len(SHAPES)


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """Numbers of the run: steps of ``batch`` prompts each, the peak learning rate, steps between checkpoints."""

    steps: int = 1500
    batch: int = 64
    learning_rate: float = 2e-3
    save_every: int = 100


def train_text_encoders(
    checkpoint: Path,
    tokenizer_path: Path,
    recipe: TextRecipe,
    *,
    seed: int = 0,
    report: Callable[[str], None] = log.info,
) -> tuple[T5Encoder, ClipText]:
    """Train both encoders to the recipe's end, from ``checkpoint`` if it exists.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    torch.manual_seed(seed)
    learner = _Learner(tokenizer_path)
    optimizer = Muon(split_parameters(learner, _is_matrix), recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    start = 0
    if checkpoint.exists():
        tensors, meta = load_checkpoint(checkpoint)
        start = int(meta["step"])
        learner.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        unpack_optimizer(optimizer, tensors, "optimizer.")
        report(f"text: resumed at step {start}")
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step / recipe.steps)
        # A stream of its own for each step: a resumed run draws what an unbroken one would have.
        rng = random.Random(f"text/{seed}/{step}")
        losses = learner.losses([prompt_with_answers(rng) for _ in range(recipe.batch)])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), GRADIENT_NORM)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"text: the loss is {loss.item()} at step {step}; lower the learning rate")
        done = step + 1
        if done % 50 == 0:
            worst = sorted(losses, key=lambda q: -losses[q].item())[:4]
            hardest = ", ".join(f"{q} {losses[q].item():.4f}" for q in worst)
            report(f"text {done}/{recipe.steps}: loss {loss.item():.4f}; hardest: {hardest}")
        if done % recipe.save_every == 0 or done == recipe.steps:
            state = {f"model.{k}": v for k, v in learner.state_dict().items()}
            save_checkpoint(checkpoint, state | pack_optimizer(optimizer, "optimizer."), {"step": done})
    return learner.t5.eval(), learner.clip.eval()


class _Learner(nn.Module):
    """Both encoders with the heads that read their answers out.

    Args:
        tokenizer_path: The tokenizer of both.
    """

    def __init__(self, tokenizer_path: Path) -> None:
        super().__init__()
        self.t5_tokenizer = read_t5_tokenizer(tokenizer_path, T5_MINI)
        self.clip_tokenizer = read_clip_tokenizer(tokenizer_path, CLIP_MINI)
        self.t5, self.clip = T5Encoder(T5_MINI), ClipText(CLIP_MINI)
        initialise(self.t5, T5_MINI.width)
        initialise(self.clip, CLIP_MINI.width)
        self.token_heads = nn.ModuleDict({q: nn.Linear(T5_MINI.width, n) for q, n in TOKEN_QUESTIONS.items()})
        self.pooled_heads = nn.ModuleDict({q: nn.Linear(CLIP_MINI.width, n) for q, n in POOLED_QUESTIONS.items()})
        self.kinds_head = nn.Linear(CLIP_MINI.width, KINDS)

    def losses(self, prompts: list[tuple[Request, list[Span]]]) -> dict[str, Tensor]:
        """How far off the answers to each question are, as a scalar each."""
        ids, answers = token_batch(prompts, self.t5_tokenizer)
        clip_ids = torch.tensor([self.clip_tokenizer(text_of(spans)).ids for _, spans in prompts])
        with mixed_precision("cpu"):
            hidden, pooled = self.t5(ids).float(), self.clip(clip_ids)[1].float()
        losses = {
            q: F.cross_entropy(head(hidden).flatten(0, 1), answers[q].flatten(), ignore_index=IGNORED)
            for q, head in self.token_heads.items()
        }
        pooled_answers, kinds = pooled_batch([request for request, _ in prompts])
        for q, head in self.pooled_heads.items():
            losses[f"pooled {q}"] = F.cross_entropy(head(pooled), pooled_answers[q])
        losses["pooled kinds"] = KINDS_WEIGHT * F.binary_cross_entropy_with_logits(self.kinds_head(pooled), kinds)
        return losses


def initialise(module: nn.Module, width: int) -> None:
    """Small normal weights: T5 has no scale in its attention, so its projections must start small."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=width**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.5 if layer.embedding_dim == width else 0.1)
        if isinstance(layer, SelfAttention):
            layer.q.get_parameter("weight").data.mul_(T5_MINI.head_width**-0.5)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """The layers' matrices; embeddings and the heads that are dropped are AdamW's."""
    return parameter.ndim == 2 and ("encoder.block" in name or "encoder.layers" in name) and "bias" not in name


def _schedule(done: float) -> float:
    return min(1.0, done / 0.03 + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def prompt_with_answers(rng: random.Random) -> tuple[Request, list[Span]]:
    """A request of training's share and one phrasing of it."""
    request = random_request(rng, sign_share=SIGN_SHARE)
    return request, phrase(request, rng)


def token_batch(prompts: list[tuple[Request, list[Span]]], tokenizer: T5Tokenizer) -> tuple[Tensor, dict[str, Tensor]]:
    """T5 ids (B, L), and for each question the answers (B, L), ``IGNORED`` on padding."""
    length = tokenizer.spec.length
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    answers = {q: torch.full((len(prompts), length), IGNORED) for q in TOKEN_QUESTIONS}
    for row, (request, spans) in enumerate(prompts):
        framed = tokenizer(text_of(spans))
        ids[row] = torch.tensor(framed.ids)
        owners = token_owners(spans, tokenizer, framed.used)
        place = 0
        for column, owner in enumerate(owners):
            piece = tokenizer.token(framed.ids[column])
            in_word = request.word is not None and owner == 0 and piece in LETTERS and place < len(request.word)
            for question, answer in token_answers(request, owner, piece if in_word else None, place).items():
                answers[question][row, column] = answer
            place += in_word
    return ids, answers


def token_owners(spans: list[Span], tokenizer: T5Tokenizer, used: int) -> list[int | None]:
    """The object that each of the first ``used`` tokens speaks of."""
    ends, owners, position = [], [], 0
    for span in spans:
        position += len(span.text)
        ends.append(position)
        owners.append(span.owner)
    result: list[int | None] = []
    for start, end in tokenizer.offsets(text_of(spans)):
        middle = (start + end) / 2
        result.append(next((o for e, o in zip(ends, owners, strict=True) if middle < e), None))
    return [*result, None][:used]


def token_answers(request: Request, owner: int | None, letter: str | None, place: int) -> dict[str, int]:
    """What each question's answer is at one token."""
    answers = {
        "background": _one_based(COLOURS, request.background),
        "things": sum(o.count for o in request.objects),
        "length": len(request.word or ""),
    }
    if owner is None:
        return answers
    if request.word is not None:
        answers["colour"] = _one_based(COLOURS, request.word_colour)
        if letter is not None:
            answers |= {"letter": _one_based(tuple(LETTERS), letter), "place": place + 1}
        return answers
    wanted = request.objects[owner]
    relation = 0
    if request.relation is not None:
        relation = 1 + RELATIONS.index(request.relation) + len(RELATIONS) * owner
    return answers | {
        "colour": _one_based(COLOURS, wanted.colour),
        "shape": _one_based(SHAPES, wanted.shape),
        "size": _one_based(SIZES, wanted.size),
        "position": _one_based(POSITIONS, wanted.position),
        "count": wanted.count,
        "index": owner,
        "relation": relation,
        "letter": 0,
        "place": 0,
    }


def pooled_batch(requests: list[Request]) -> tuple[dict[str, Tensor], Tensor]:
    """Answers of the pooled questions (B,), and how many of each colour and shape are wanted (B, kinds) as 0 or 1."""
    answers: dict[str, list[int]] = {q: [] for q in POOLED_QUESTIONS}
    kinds = torch.zeros(len(requests), KINDS)
    for row, request in enumerate(requests):
        word = request.word or ""
        answers["background"].append(_one_based(COLOURS, request.background))
        answers["things"].append(sum(o.count for o in request.objects))
        answers["length"].append(len(word))
        answers["word colour"].append(_one_based(COLOURS, request.word_colour))
        for i in range(MAX_LETTERS):
            answers[f"letter {i}"].append(_one_based(tuple(LETTERS), word[i] if i < len(word) else None))
        for o in request.objects:
            kinds[row, COLOURS.index(o.colour) * len(SHAPES) + SHAPES.index(o.shape)] = 1
    return {q: torch.tensor(values) for q, values in answers.items()}, kinds


def _one_based(choices: tuple[str, ...], value: str | None) -> int:
    """Index of a value counted from 1, and 0 for none."""
    return 0 if value is None else 1 + choices.index(value)
