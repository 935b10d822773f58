"""Algebra on gradient rows kept as lists of tensors, one per parameter: no flat copy is made."""

# K rows, P columns

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Grads = list[Tensor]


def zeros_for(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Grads:
    """The gradients, with zeros where autograd found no path."""
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def gramian_of(rows: Sequence[Grads]) -> Tensor:
    """Gramian [K,K] float64 (CPU) of K rows given as lists of tensors.

    Products are taken per tensor in float32 and added in float64: one flat float32 product over
    all parameters loses the small layers next to the large ones (0.5 % on ResNet-18).
    """
    total: Tensor | None = None
    for tensors in zip(*rows, strict=True):
        matrix = torch.stack([t.flatten() for t in tensors])
        if matrix.dtype in (torch.float16, torch.bfloat16):
            matrix = matrix.float()
        product = _product(matrix)
        total = product if total is None else total + product
    if total is None:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64)
    return total.cpu()


def _product(matrix: Tensor, chunk: int = 1 << 16) -> Tensor:
    """Matrix times its transpose, in float64 over chunks of columns."""
    if matrix.dtype == torch.float64 or matrix.shape[1] <= chunk:
        return (matrix @ matrix.T).double()
    full = matrix.shape[1] // chunk * chunk
    body = matrix[:, :full].view(len(matrix), -1, chunk).transpose(0, 1)  # [chunks, K, chunk]
    total = torch.bmm(body, body.transpose(1, 2)).double().sum(0)
    rest = matrix[:, full:]
    return total + (rest @ rest.T).double()


def combine(rows: Sequence[Grads], weights: Tensor, in_place: bool = True) -> Grads:
    """Weighted sum of the rows; ``in_place`` reuses the memory of the first one."""
    factors = weights.tolist()
    first = rows[0]
    if in_place:
        torch._foreach_mul_(first, factors[0])
        total = first
    else:
        total = list(torch._foreach_mul(first, factors[0]))
    for row, factor in zip(rows[1:], factors[1:], strict=True):
        torch._foreach_add_(total, row, alpha=factor)
    return total


def add_(total: Grads, grads: Grads) -> None:
    """Add ``grads`` to ``total`` in place; an empty total takes them over."""
    if total:
        torch._foreach_add_(total, grads)
    else:
        total.extend(grads)
