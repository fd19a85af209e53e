"""The transformer's blocks: attention over the video, attention to the text, and a feed-forward pair, modulated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .linear import Linear


class LayerNorm(nn.LayerNorm):
    """Computes in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Of queries and keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Of tokens `(1, tokens, dim)` to others, or to themselves. `q_loras`, Stand-In's, may be set from outside."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        others = x if others is None else others
        q = self.q(x) + self.q_loras(x) if hasattr(self, "q_loras") else self.q(x)
        parts = self.norm_q(q), self.norm_k(self.k(others)), self.v(others)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FaceBlock(nn.Module):
    """Attends to the motion of a face; the model calls it when its block is through."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1_q, self.linear1_kv, self.linear2 = (Linear(dim, dim) for _ in range(3))

    def forward(self, x: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        weights = (self.linear1_q(x) @ self.linear1_kv(motion).transpose(1, 2)).softmax(dim=-1)
        return self.linear2(weights @ motion)


class WanAttentionBlock(nn.Module):
    """25 tensors, as in the real one. `audio_block` may be set from outside."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        *,
        block_idx: int = 0,
        face_fuser_block: bool = False,
        is_controlled: bool = False,
    ) -> None:
        super().__init__()
        self.block_idx = block_idx
        self.rope_func = "default"
        self.kv_cache = None
        self.has_face_fuser_block = face_fuser_block
        self.norm1 = LayerNorm(dim, elementwise_affine=False)
        self.self_attn = Attention(dim, heads)
        self.norm3 = LayerNorm(dim)
        self.cross_attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        if face_fuser_block:
            self.fuser_block = FaceBlock(dim)
        if is_controlled:
            self.control_blocks_dense, self.control_combine_linears = Linear(dim, dim), Linear(dim, dim)

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        context: torch.Tensor,
        x_ip: torch.Tensor | None = None,
        lynx_ref_feature: torch.Tensor | None = None,
        x_ovi: torch.Tensor | None = None,
        lynx_ref_feature_extractor: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.to(e.dtype) + e).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1) + shift1
        if lynx_ref_feature is not None:
            y = y + 0.1 * lynx_ref_feature
        if lynx_ref_feature_extractor:
            lynx_ref_feature = y.mean(dim=1, keepdim=True)
        x = x + self.self_attn(y) * gate1
        x = x + self.cross_attn(self.norm3(x), context)
        if x_ovi is not None:
            x_ovi = self.audio_block(x_ovi, e, context)[0]
            x = x + x_ovi.mean(dim=1, keepdim=True)
        x = x + self.ffn(self.norm2(x) * (1 + scale2) + shift2) * gate2
        return x, x_ip, lynx_ref_feature, x_ovi


class VaceWanAttentionBlock(WanAttentionBlock):
    """Makes a hint for one of the model's blocks. The first has a projection before it, each has one after it."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, *, block_id: int) -> None:
        super().__init__(dim, ffn_dim, heads)
        self.register_buffer("block_id", torch.tensor(block_id, device="cpu"))
        if block_id == 0:
            self.before_proj = Linear(dim, dim)
        self.after_proj = Linear(dim, dim)

    def forward(self, c: torch.Tensor, **others: Any) -> tuple[Any, ...]:
        return super().forward(c, **others)


class BaseWanAttentionBlock(WanAttentionBlock):
    """A block of a model with VACE blocks; `block_id` is the index of its hint."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, *, block_id: int | None, block_idx: int) -> None:
        super().__init__(dim, ffn_dim, heads, block_idx=block_idx)
        if block_id is None:
            self.block_id = None
        else:
            self.register_buffer("block_id", torch.tensor(block_id, device="cpu"))

    def forward(
        self,
        x: torch.Tensor,
        vace_hints: list[list[torch.Tensor]] | None = None,
        vace_context_scale: list[float] | None = None,
        **others: Any,
    ) -> tuple[Any, ...]:
        x, *rest = super().forward(x, **others)
        if vace_hints is not None and self.block_id is not None:
            for hints, scale in zip(vace_hints, vace_context_scale, strict=True):
                x.add_(hints[self.block_id].to(x.device), alpha=scale)
        return x, *rest


class Head(nn.Module):
    """From tokens to patches of the video."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, elementwise_affine=False)
        self.head = Linear(dim, out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation.to(e.dtype) + e.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)
