"""Attention windows over a grid of tokens, cut so that those at the right and bottom edge may be smaller.

The published encoders fill such windows up with zero tokens. All zeros of a window have one key and one value, so they
can stand as one key with a bias of its own: exact, and a window costs no more than the tokens in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attend_in_windows(tokens: Tensor, window: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``attend`` to every window.

    Args:
        tokens: (B,H,W,dim).
        window: side of a whole window.
        attend: (windows, rows, columns, dim) -> the same shape; rows and columns are at most ``window``.

    Returns:
        (B,H,W,dim).
    """
    strips = []
    for strip, rows in _cut(tokens, 1, window):
        parts = [_attend(part, rows, columns, attend) for part, columns in _cut(strip, 2, window)]
        strips.append(_join(parts, 2))
    return _join(strips, 1)


def _attend(tokens: Tensor, rows: int, columns: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """(B,H,W,dim) -> same; H and W are multiples of the windows' ``rows`` and ``columns``."""
    batch, height, width, dim = tokens.shape
    grid = (height // rows, width // columns)
    windows = tokens.reshape(batch, grid[0], rows, grid[1], columns, dim).transpose(2, 3)
    attended = attend(windows.reshape(-1, rows, columns, dim))
    return attended.view(batch, *grid, rows, columns, dim).transpose(2, 3).reshape(tokens.shape)


def _cut(tokens: Tensor, dim: int, window: int) -> list[tuple[Tensor, int]]:
    """The part that holds whole windows and the rest, each with the length of its windows along ``dim``."""
    length = tokens.shape[dim]
    whole = length - length % window
    sizes = [(whole, window), (length - whole, length - whole)]
    parts = tokens.split([size for size, _ in sizes], dim)
    return [(part, side) for part, (size, side) in zip(parts, sizes, strict=True) if size]


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
