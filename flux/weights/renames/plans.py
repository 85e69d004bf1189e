"""Plans: for each tensor that is wanted, the stored ones that it is made of, cut and joined along rows (dimension 0).

A plan knows names alone and touches no number, so it serves packed tensors as it serves plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ...errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Packing", "Piece", "Plan", "Recipe", "Reshape", "assemble"]

Shape = tuple[int, ...]


class Packing(Enum):
    """How far a storage format lets a tensor's rows be told apart."""

    PLAIN = "every number by itself, in the tensor's own shape"
    SCALED = "every number by itself, with one scale for the whole tensor"
    ROWS = "every row packed by itself"
    WHOLE = "rows cannot be told apart"


class Reshape(Enum):
    """What becomes of a shape after rows were joined; the numbers keep their order."""

    KEEP = "as it is"
    TO_CONV = "(N, K) becomes (N, K, 1, 1)"
    TO_LINEAR = "(N, K, 1, 1) becomes (N, K)"


@dataclass(frozen=True)
class Piece:
    """Rows of one stored tensor: of ``of`` equal shares, those from ``start`` to before ``stop``."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == self.of

    def rows(self, count: int) -> slice:
        """The rows of a tensor that has ``count`` of them.

        Raises:
            FileError: They do not divide into the shares.
        """
        if count % self.of:
            raise FileError(
                f"tensor {self.name} has {count} rows, which do not divide into {self.of} parts; use a whole file of "
                "this model"
            )
        share = count // self.of
        return slice(self.start * share, self.stop * share)


@dataclass(frozen=True)
class Recipe:
    """How one tensor is made: pieces joined along rows, in ``shares`` of the whole, then the reshape."""

    pieces: tuple[Piece, ...]
    shares: tuple[int, ...] = (1,)
    reshape: Reshape = Reshape.KEEP

    @property
    def sources(self) -> tuple[str, ...]:
        """The stored tensors that it needs, each once."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces))

    @property
    def only_renames(self) -> bool:
        """Whether a stored tensor serves as it is."""
        return len(self.pieces) == 1 and self.pieces[0].is_whole and self.reshape is Reshape.KEEP

    def suits(self, packing: Packing) -> bool:
        """Whether packed tensors, all of one format, can be handled so without unpacking them to numbers."""
        if self.only_renames or packing is Packing.PLAIN:
            return True
        if packing is Packing.SCALED:
            return len(self.sources) == 1  # tensors to join have scales of their own
        return packing is Packing.ROWS and self.reshape is Reshape.KEEP

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """The shape of what it makes, by the stored tensors' shapes.

        Args:
            shape_of: The shape that the numbers of a stored tensor have, by its name.

        Raises:
            FileError: The shapes do not fit each other or the recipe.
        """
        if self.only_renames:
            return tuple(shape_of(self.pieces[0].name))
        rows, rest = [], []
        for piece in self.pieces:
            shape = tuple(shape_of(piece.name))
            if not shape:
                raise FileError(f"tensor {piece.name} is a single number; use a whole file of this model")
            span = piece.rows(shape[0])
            rows.append(span.stop - span.start)
            rest.append(shape[1:])
        if any(other != rest[0] for other in rest) or any(
            count * self.shares[0] != rows[0] * share for count, share in zip(rows, self.shares, strict=True)
        ):
            found = ", ".join(f"{name} {list(shape_of(name))}" for name in self.sources)
            raise FileError(f"tensors that belong together do not fit: {found}; use a whole file of this model")
        return self._reshaped((sum(rows), *rest[0]))

    def _reshaped(self, shape: Shape) -> Shape:
        if self.reshape is Reshape.KEEP:
            return shape
        if self.reshape is Reshape.TO_CONV and len(shape) == 2:
            return (*shape, 1, 1)
        if self.reshape is Reshape.TO_LINEAR and len(shape) == 4 and shape[2:] == (1, 1):
            return shape[:2]
        raise FileError(
            f"tensor {self.pieces[0].name} has shape {list(shape)}, but {self.reshape.value}; use a whole file of this "
            "model"
        )


class Plan(Mapping[str, Recipe]):
    """The recipe of every tensor by its name, and the stored tensors that are left out on purpose."""

    def __init__(self, recipes: Mapping[str, Recipe], dropped: tuple[str, ...] = ()) -> None:
        self._recipes, self.dropped = dict(recipes), dropped

    def __getitem__(self, name: str) -> Recipe:
        return self._recipes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def shapes(self, shape_of: Callable[[str], Shape]) -> dict[str, Shape]:
        """The shape of every tensor; see ``Recipe.shape``."""
        return {name: recipe.shape(shape_of) for name, recipe in self.items()}

    def under(self, sources: str = "", targets: str = "") -> Plan:
        """The same plan with these prefixes before stored and made names."""
        if not (sources or targets):
            return self
        recipes = {
            targets + target: Recipe(
                tuple(Piece(sources + piece.name, piece.start, piece.stop, piece.of) for piece in recipe.pieces),
                recipe.shares,
                recipe.reshape,
            )
            for target, recipe in self.items()
        }
        return Plan(recipes, tuple(sources + name for name in self.dropped))


def assemble(recipe: Recipe, read: Callable[[str], Tensor]) -> Tensor:
    """Carry a recipe out on numbers.

    Args:
        recipe: From a plan.
        read: Gives a stored tensor's numbers by its name; called once for each.

    Returns:
        A view of what ``read`` gave where nothing had to be joined.

    Raises:
        FileError: The shapes do not fit each other or the recipe.
    """
    import torch  # here, so that names and shapes of a file are known without it

    tensors = {name: read(name) for name in recipe.sources}
    shape = recipe.shape(lambda name: tuple(tensors[name].shape))
    if recipe.only_renames:
        return tensors[recipe.pieces[0].name]
    parts = [tensors[piece.name][piece.rows(len(tensors[piece.name]))] for piece in recipe.pieces]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)
