"""Attention of SAM's ViT without ever holding what the windows' padding or the attention matrix would take.

The same numbers as segment-anything's own modules give (Kirillov et al., "Segment Anything", ICCV 2023; relative
positions as in Li et al., MViTv2, equation 4), from the same parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from torch import Tensor

from samadapt.backbones.windows import attend_in_windows


class FusedAttention(Attention):
    """(windows, rows, columns, dim) -> the same shape.

    Rows and columns may be less than the side for which the tables of relative positions were made: the rest of the
    window is zeros, see ``samadapt.backbones.windows``.
    """

    def forward(self, x: Tensor) -> Tensor:
        windows, rows, columns, dim = shape = x.shape
        tokens = rows * columns
        side = (len(self.rel_pos_h) + 1) // 2
        x = x.reshape(windows, tokens, dim)
        if side > min(rows, columns):
            x = F.pad(x, (0, 0, 0, 1))
        qkv = self.qkv(x).view(windows, -1, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = q[:, :, :tokens]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q, rows, columns, side))
        return self.proj(x.transpose(1, 2).reshape(shape))

    def _bias(self, q: Tensor, rows: int, columns: int, side: int) -> Tensor:
        """(windows,heads,N,N): how much each of N tokens likes the distance to each other one.

        In a window with zeros (windows,heads,N,N+1): the last column stands for all of them.
        """
        grid = q.unflatten(2, (rows, columns))
        by_row = torch.einsum("nxhwd,hkd->nxhwk", grid, get_rel_pos(side, side, self.rel_pos_h)[:rows])
        by_column = torch.einsum("nxhwd,wkd->nxhwk", grid, get_rel_pos(side, side, self.rel_pos_w)[:columns])
        near = by_row[..., :rows, None] + by_column[..., None, :columns]
        bias = near.flatten(4).flatten(2, 3)
        if side <= min(rows, columns):
            return bias
        # The logarithm of a sum of exponentials over a rectangle of keys is the sum of those over its two sides.
        zeros = [by_row[..., rows:].logsumexp(-1) + by_column.logsumexp(-1)] if rows < side else []
        if columns < side:
            zeros.append(by_row[..., :rows].logsumexp(-1) + by_column[..., columns:].logsumexp(-1))
        return torch.cat([bias, torch.stack(zeros).logsumexp(0).flatten(2)[..., None]], dim=-1)


class FusedBlock(Block):
    """The package's block with ``FusedAttention`` in windows that may be cut at the edges."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        attended = attend_in_windows(normed, self.window_size, self.attn) if self.window_size else self.attn(normed)
        x = x + attended
        return x + self.mlp(self.norm2(x))


def fuse(block: Block) -> None:
    """Let a block of the package compute as ``FusedBlock`` does, in place; its parameters stay where they are."""
    block.__class__ = FusedBlock
    block.attn.__class__ = FusedAttention


class PlainAttention(Attention):
    """(B,rows,columns,dim) -> the same shape, from the parameters of ``Attention`` without the tables of positions."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        found = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(found.transpose(1, 2).flatten(2)).view_as(x)


def strip(block: Block) -> None:
    """Let a block attend over the whole image, blind to distances, with the norms' eps at 1e-5, in place.

    So S-SAM's published code runs SAM's weights (arXiv 2408.06447): built with the class's defaults, it drops windows
    and tables of relative positions without a word.
    """
    block.__class__ = FusedBlock
    block.window_size = 0
    block.attn.__class__ = PlainAttention
    block.attn.use_rel_pos = False
    block.norm1.eps = block.norm2.eps = 1e-5
