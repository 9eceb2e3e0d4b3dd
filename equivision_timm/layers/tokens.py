"""Layers of tokens in the irreps basis (layers/irreps.py): linear, norm, scale, MLP, attention.

Tokens are [..., |G| * fields]. In all layers `fields` is the number of regular fields, `group` the name of the group,
and further keywords are the device and dtype of the parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerScale, register_notrace_module, trunc_normal_, use_fused_attn

from equivision_timm.constants import constant, constant_like
from equivision_timm.layers.irreps import ChangeBasis, irreps_matrix, irreps_of

__all__ = ["IrrepAttention", "IrrepLinear", "IrrepMlp", "IrrepNorm", "IrrepScale", "OnTokens"]


class IrrepLinear(nn.Module):
    """Linear layer in the irreps basis, which commutes with the group.

    By Schur's lemma one matrix for each one-dimensional irrep, and for E one on the multiplicity, the same for both
    rows; if E is of complex type (C4) two, W x + V J x with J the rotation by 90 degrees. The bias is on the trivial
    irrep. A D4 layer has 1/8 of the weights of a dense one and 3/16 of its multiply-accumulates.

    Parameters: `weight` [ones, out_fields, in_fields]; `weight_plane` [2 * out_fields, 2 * in_fields], in C4
    [2, out_fields, in_fields], None without E; `bias` [out_fields].

    Args:
        source: layout of the input: 'tokens' [..., |G| * fields]; or regular fields, the change of basis is then part
            of the layer: 'elements' [|G|, ..., fields] or 'fields' [..., fields * |G|].
        target: layout of the output, likewise.

    Source of the maths: Serre, Linear Representations of Finite Groups (1977), chapter 2.
    """

    def __init__(
        self, in_fields: int, out_fields: int, group: str, source: str = "tokens", target: str = "tokens", **dd: Any
    ) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.in_fields = in_fields
        self.out_fields = out_fields
        self.group = group
        self.source = source
        self.target = target
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.multiplicity: int = irreps.multiplicity
        self.weight: nn.Parameter = nn.Parameter(torch.empty(irreps.ones, out_fields, in_fields, **dd))
        self.weight_plane: nn.Parameter | None = None
        if irreps.multiplicity == 2:
            self.weight_plane = nn.Parameter(torch.empty(2 * out_fields, 2 * in_fields, **dd))
        elif irreps.multiplicity == 1:
            self.weight_plane = nn.Parameter(torch.empty(2, out_fields, in_fields, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(out_fields, **dd))
        self._matrix = _pair_matrix(group, torch.float64, torch.device("cpu"))  # not state; for TorchScript
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, std_plane: float = 0.02) -> None:
        """Truncated normal weights, zero bias."""
        trunc_normal_(self.weight, std=std)
        if self.weight_plane is not None:
            trunc_normal_(self.weight_plane, std=std_plane)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self._matrix.to(x) if torch.jit.is_scripting() else _pair_matrix_like(x, self.group)
        n, m, order = self.ones, self.multiplicity, self.order
        shape = x.shape[1:-1] if self.source == "elements" else x.shape[:-1]
        if self.source == "tokens":
            x = x.reshape(-1, order, self.in_fields).transpose(0, 1)  # [|G|, T, in]
        elif self.source == "elements":
            x = torch.mm(q, x.reshape(order, -1)).view(order, -1, self.in_fields)  # [|G|, T, in]
        else:
            x = torch.mm(q, x.reshape(-1, order).t()).view(order, -1, self.in_fields)
        ones, first, second = x.split([n, m, m])  # the second of each pair of blocks after all the first
        if self.source == "tokens":
            first, second = x[n:].unflatten(0, (m, 2)).unbind(1)
        bias = F.pad(self.bias[None, None], [0, 0, 0, 0, 0, n - 1])
        ones = torch.baddbmm(bias, ones, self.weight.transpose(1, 2))  # [ones, T, out]
        plane = ones
        matrices = self.plane_matrices()
        if matrices is not None:
            from_first, from_second = matrices.transpose(2, 3).unbind(1)  # [2, in, out]
            first, second = first.reshape(-1, self.in_fields), second.reshape(-1, self.in_fields)  # [m * T, in]
            plane = torch.bmm(first.expand(2, -1, -1), from_first)  # [2, m * T, out]
            plane = plane.baddbmm_(second.expand(2, -1, -1).to(plane.dtype), from_second.to(plane.dtype))
        if self.target == "tokens":
            parts = [ones]
            for i in range(m):
                parts.append(plane.view(2, m, -1, self.out_fields)[:, i])  # noqa: PERF401  (TorchScript)
            return torch.cat([part.transpose(0, 1) for part in parts], 1).flatten(1).unflatten(0, shape)
        if self.target == "elements":
            y = torch.mm(q[:n].t(), ones.flatten(1))  # [|G|, T * out]
            if m > 0:
                y = y.addmm_(q[n:].t().to(y.dtype), plane.view(2 * m, -1))
            return y.view(order, -1, self.out_fields).unflatten(1, shape)  # [|G|, ..., out]
        y = torch.mm(ones.flatten(1).t(), q[:n])  # [T * out, |G|]
        if m > 0:
            y = y.addmm_(plane.view(2 * m, -1).t(), q[n:].to(y.dtype))
        return y.view(-1, self.out_fields * order).unflatten(0, shape)  # [..., out * |G|]

    def plane_matrices(self) -> torch.Tensor | None:
        """Matrices [2, 2, out, in] from the second axis, the blocks of a pair, to the first: in D4 the pairs are the
        rows of E; in C4 the only one is both rows, [[W, -V], [V, W]]; None without E.
        """
        weight = self.weight_plane
        if weight is None:
            return None
        if self.multiplicity == 2:
            return weight.view(2, self.out_fields, 2, self.in_fields).transpose(1, 2)
        w, v = weight[0], weight[1]
        return torch.stack([w, -v, v, w]).view(2, 2, self.out_fields, self.in_fields)

    @torch.jit.unused
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer on field-major regular fields, Q^T W Q: matrix [out * |G|, in * |G|] and bias [out * |G|]."""
        q = _pair_matrix_like(self.weight, self.group)
        ones, pairs = q[: self.ones], q[self.ones :].unflatten(0, (2, -1))  # [ones, |G|], [2, multiplicity, |G|]
        dense = torch.einsum("ig,ih,ion->ognh", ones, ones, self.weight)
        matrices = self.plane_matrices()
        if matrices is not None:
            dense = dense + torch.einsum("cmg,dmh,cdon->ognh", pairs, pairs, matrices)
        return dense.flatten(2).flatten(0, 1), (self.bias[:, None] * q[0]).flatten()

    def scale_rows(self, scale: torch.Tensor) -> None:
        """Multiply each field of the output by its entry of `scale` [out_fields]."""
        for name, value in self.named_parameters():
            factor = scale.repeat(2) if name == "weight_plane" and self.multiplicity == 2 else scale
            value.mul_(factor if name == "bias" else factor[:, None])

    def extra_repr(self) -> str:
        return f"{self.in_fields}, {self.out_fields}, {self.group!r}, {self.source!r}, {self.target!r}"


register_notrace_module(IrrepLinear)  # one node if timm traces a model, which TorchScript can compile


@constant
def _pair_matrix(group: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Q with the pairs of blocks of E that a matrix joins apart: the first of each pair, then the second."""
    matrix, n = irreps_matrix(group, torch.float64, torch.device("cpu")), irreps_of(group).ones
    pairs = matrix[n:].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) if len(matrix) > n else matrix[n:]
    return torch.cat([matrix[:n], pairs]).to(device, dtype)


@torch.fx.wrap  # reads dtype and device of x: one node in a graph of torch.fx
def _pair_matrix_like(x: torch.Tensor, group: str) -> torch.Tensor:
    return constant_like(x, _pair_matrix, group)


class IrrepNorm(nn.Module):
    """Layer norm of tokens in the irreps basis: [..., |G| * fields] -> the same shape; float32 inside for half types.

    The mean over its channels is subtracted from each irrep (of E from each row); all are divided by

        std = sqrt((sum of var_i + eps) / |G|), var_i the variance of irrep i, of E the mean over the rows,

    then scaled, the rows of E alike; the trivial irrep is shifted. The sum is that of octic-vits, whose published
    weights depend on it: it counts E once, where the variance of the regular basis would be the sum with 4 var_E.

    Parameters: `weight` [scales * fields], `bias` [fields].
    """

    def __init__(self, fields: int, group: str, eps: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        irreps = irreps_of(group)
        self.fields = fields
        self.eps = eps
        self.order: int = irreps.order
        self.ones: int = irreps.ones
        self.rows: int = irreps.rows
        self.multiplicity: int = irreps.multiplicity
        self.weight: nn.Parameter = nn.Parameter(torch.empty(irreps.scales * fields, **dd))
        self.bias: nn.Parameter = nn.Parameter(torch.empty(fields, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scales 1, shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = _at_least_float32(x).unflatten(-1, (self.order, self.fields))  # [..., |G|, fields]
        mean = blocks.mean(-1)  # [..., |G|]
        if self.rows > 0:
            plane = mean[..., self.ones :].unflatten(-1, (self.rows, self.multiplicity))
            row = plane.mean(-1, keepdim=True).expand_as(plane).flatten(-2)  # [..., rows * multiplicity]
            mean = torch.cat([mean[..., : self.ones], row], -1)
        blocks = blocks - mean.unsqueeze(-1)
        power = blocks.square().mean(-1)  # [..., |G|]
        total = power[..., : self.ones].sum(-1)
        if self.rows > 0:
            total = total + power[..., self.ones :].mean(-1)  # var_E: mean over rows and channels
        y = blocks.flatten(-2) * torch.rsqrt((total + self.eps) / self.order).unsqueeze(-1)
        weight = _each_channel(self.weight, self.multiplicity * self.fields)
        bias = F.pad(self.bias, [0, (self.order - 1) * self.fields])
        return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.fields}, eps={self.eps}"


register_notrace_module(IrrepNorm)  # one node if timm traces a model for its features


@torch.fx.wrap  # reads the dtype of x: one node in a graph of torch.fx
def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.bfloat16 or x.dtype == torch.float16 else x


def _each_channel(scales: torch.Tensor, plane: int) -> torch.Tensor:
    """Factors [scales * fields] -> one for each channel, [|G| * fields]: the last `plane` are those of both E rows."""
    return torch.cat([scales, scales[scales.shape[0] - plane :]])


class IrrepScale(LayerScale):
    """LayerScale of tokens in the irreps basis, the same for both rows of E. Parameter: `gamma` [scales * fields]."""

    def __init__(self, fields: int, group: str, init_values: float = 1e-4, **dd: Any) -> None:
        super().__init__(irreps_of(group).scales * fields, init_values, **dd)
        self.plane: int = irreps_of(group).multiplicity * fields

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * _each_channel(self.gamma, self.plane)


class IrrepMlp(nn.Module):
    """Linear, pointwise activation in the regular basis, linear: tokens [..., |G| * fields] -> the same shape.

    Dropout with probability `drop` before and after the second linear layer.
    """

    def __init__(
        self,
        fields: int,
        hidden_fields: int,
        group: str,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.fc1: IrrepLinear = IrrepLinear(fields, hidden_fields, group, target="elements", **dd)
        self.act: nn.Module = act_layer()
        self.drop1: nn.Dropout = nn.Dropout(drop)
        self.fc2: IrrepLinear = IrrepLinear(hidden_fields, fields, group, source="elements", **dd)
        self.drop2: nn.Dropout = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.fc1(x))  # [|G|, ..., hidden_fields]
        return self.drop2(self.fc2(self.drop1(x)))


class IrrepAttention(nn.Module):
    """Multi-head self-attention of tokens in the irreps basis: [B, N, |G| * fields] -> the same shape.

    A head takes `fields / num_heads` channels of each block. The group acts on all tokens alike, by orthogonal
    matrices: the products of queries and keys do not change, and the values transform as the tokens. So the attention
    itself is the usual one, fused or not as timm's (`timm.layers.set_fused_attn`).
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self, fields: int, num_heads: int, group: str, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd: Any
    ) -> None:
        super().__init__()
        self.order: int = irreps_of(group).order
        if num_heads < 1 or fields % num_heads:
            raise ValueError(f"num_heads {num_heads}: embed_dim must be a multiple of {self.order} * num_heads")
        self.num_heads = num_heads
        self.head_fields: int = fields // num_heads
        self.scale: float = (self.order * self.head_fields) ** -0.5
        self.fused_attn = use_fused_attn()
        self.qkv: IrrepLinear = IrrepLinear(fields, 3 * fields, group, **dd)
        self.attn_drop: nn.Dropout = nn.Dropout(attn_drop)
        self.proj: IrrepLinear = IrrepLinear(fields, fields, group, **dd)
        self.proj_drop: nn.Dropout = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(2, (self.order, 3, self.num_heads, self.head_fields))
        qkv = qkv.permute(3, 0, 4, 1, 2, 5).flatten(4)  # [3, B, heads, N, |G| * head_fields]
        q, k, v = qkv.unbind(0)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)  # [B, heads, N, N]
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        x = x.unflatten(3, (self.order, self.head_fields)).permute(0, 2, 3, 1, 4)  # [B, N, |G|, heads, head_fields]
        return self.proj_drop(self.proj(x.flatten(2)))


class OnTokens(nn.Module):
    """`inner`, which takes tokens [B, H, W, |G| * fields], on regular fields [B, fields * |G|, H, W]."""

    def __init__(self, inner: nn.Module, group: str) -> None:
        super().__init__()
        self.inner = inner
        self.to_irreps: ChangeBasis = ChangeBasis(group, "irreps")
        self.to_regular: ChangeBasis = ChangeBasis(group, "regular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.to_irreps(x.permute(0, 2, 3, 1)))  # [B, H, W, |G| * fields]
        return self.to_regular(x).permute(0, 3, 1, 2)
