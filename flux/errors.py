"""The pack's exceptions. A ``UserError`` can be mended by who runs the pack, and its message says how."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "Cancelled",
    "DeviceLostError",
    "ExhaustedError",
    "FileError",
    "FluxFoundryError",
    "MismatchError",
    "MissingFileError",
    "NumericError",
    "UserError",
]


class FluxFoundryError(Exception):
    """Everything this pack raises on purpose."""


class UserError(FluxFoundryError):
    """An input that cannot be used: the message says what was found and what to do."""


class BudgetError(UserError):
    """A budget that is below what a run can do with.

    Attributes:
        least: Bytes that it can do with.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


class ExhaustedError(UserError):
    """Memory that ran out where nothing could be streamed any more."""


class FileError(UserError):
    """A file that is damaged, of another kind, or not to be opened."""


class MissingFileError(UserError):
    """A file that is not where it is needed."""


class MismatchError(UserError):
    """Parts that do not fit each other."""


class DeviceLostError(FluxFoundryError):
    """A device that stopped working."""


class NumericError(FluxFoundryError):
    """A result that is not finite."""


class Cancelled(FluxFoundryError):  # noqa: N818 - not an error
    """The caller asked a run to stop."""
