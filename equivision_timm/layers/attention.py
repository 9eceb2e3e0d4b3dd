"""Self-attention of tokens in the irreps basis."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from equivision_timm.layers.irreps import irreps_of
from equivision_timm.layers.linear import IrrepLinear

__all__ = ["IrrepAttention"]


class IrrepAttention(nn.Module):
    """Multi-head self-attention that commutes with the group: [B, N, |G| * fields] -> the same shape.

    Every head takes `fields / num_heads` channels of each block. The group acts on all tokens alike and, in the irreps
    basis, by orthogonal matrices: the products of queries and keys do not change, the values are carried along. So the
    attention itself is the ordinary one.

    Args:
        fields: number of fields; the heads divide it.
        num_heads: number of heads.
        group: name of the group.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        device: where to create the parameters.
        dtype: their type.

    Raises:
        ValueError: heads that do not divide the fields.
    """

    def __init__(
        self,
        fields: int,
        num_heads: int,
        group: str,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.order: int = irreps_of(group).order
        if num_heads < 1 or fields % num_heads:
            dim = self.order * fields
            raise ValueError(
                f"num_heads {num_heads} makes heads of width {dim}/{num_heads}, which {self.order}, the order of "
                f"{group}, does not divide: embed_dim must be a multiple of {self.order} * num_heads"
            )
        self.num_heads = num_heads
        self.head_fields: int = fields // num_heads
        self.qkv: IrrepLinear = IrrepLinear(fields, 3 * fields, group, "blocks", device=device, dtype=dtype)
        self.attn_drop: nn.Dropout = nn.Dropout(attn_drop)
        self.proj: IrrepLinear = IrrepLinear(fields, fields, group, "tokens", device=device, dtype=dtype)
        self.proj_drop: nn.Dropout = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, self.head_fields))  # [|G|, B, N, 3, heads, head_fields]
        qkv = qkv.permute(3, 1, 4, 2, 0, 5).flatten(4)  # [3, B, heads, N, |G| * head_fields]
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        x = x.unflatten(3, (self.order, self.head_fields)).permute(3, 0, 2, 1, 4)  # [|G|, B, N, heads, head_fields]
        return self.proj_drop(self.proj(x.flatten(3)))
