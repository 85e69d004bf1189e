"""Weights of one tensor each, for tests of what moves them: packed is the tensor as it stands."""

from __future__ import annotations

import torch

__all__ = ["Packed", "Stored"]


class Packed:
    """A weight as it is stored, whose numbers are the tensor's."""

    def __init__(self, tensor):
        self.tensor, self.nbytes, self.device = tensor, tensor.nbytes, tensor.device

    def tensors(self):
        return {"data": self.tensor}

    def with_tensors(self, tensors):
        return Packed(tensors["data"])

    def numbers(self, dtype):
        return self.tensor.to(dtype)

    def product(self, x, bias):
        return None


class Stored:
    """A weight in a file; ``before_read`` may note a read, or fail."""

    def __init__(self, tensor):
        self.tensor = tensor

    def before_read(self):
        pass

    @property
    def nbytes(self):
        return self.tensor.nbytes

    @property
    def parameters(self):
        return self.tensor.numel()

    @property
    def pieces(self):
        return (self.nbytes,)

    def numbers(self, dtype, device=None):
        return self.tensor.to(dtype)

    def packed(self, device=None):
        return Packed(self.tensor)

    def forget(self):
        pass

    def read_into(self, targets):
        self.before_read()
        targets["data"].copy_(self.tensor.flatten().view(torch.uint8))
