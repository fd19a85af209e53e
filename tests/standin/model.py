"""WanModel: embeds, runs VACE's blocks and its own, swaps them by itself if asked, and makes a video of the tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import beside
from . import management as mm
from .blocks import BaseWanAttentionBlock, Head, VaceWanAttentionBlock, WanAttentionBlock
from .cache_state import CacheState, ask_cache, keep_end, keep_output, kept_input
from .linear import Linear, update_lora_step


class WanModel(nn.Module):
    """A video transformer of `num_layers` blocks.

    Args:
        vace_layers: The layers that have a VACE block; None for a model without VACE.
        face_layers: The layers whose block has a face block (WanAnimate).
        control_layers: The layers whose block has control layers (LongVie2).
        has_image: It takes CLIP features of an image.
        has_beside: It has modules beside its blocks.
    """

    def __init__(
        self,
        *,
        dim: int = 32,
        ffn_dim: int = 64,
        num_heads: int = 2,
        num_layers: int = 4,
        in_dim: int = 4,
        out_dim: int = 4,
        text_len: int = 8,
        text_dim: int = 16,
        freq_dim: int = 16,
        vace_layers: Sequence[int] | None = None,
        face_layers: Sequence[int] = (),
        control_layers: Sequence[int] = (),
        has_image: bool = False,
        has_beside: bool = False,
        main_device: torch.device | None = None,
        offload_device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.dim, self.ffn_dim, self.num_heads, self.num_layers = dim, ffn_dim, num_heads, num_layers
        self.in_dim, self.out_dim, self.text_len, self.freq_dim = in_dim, out_dim, text_len, freq_dim
        self.main_device = main_device or mm.get_torch_device()
        self.offload_device = offload_device or mm.unet_offload_device()
        self.cache_device, self.base_dtype = self.offload_device, dtype
        self.patched_linear = False

        self.blocks_to_swap = -1
        self.vace_blocks_to_swap = -1
        self.prefetch_blocks = 0
        self.block_swap_debug = False
        self.use_non_blocking = False
        self.offload_txt_emb = False
        self.offload_img_emb = False

        self.enable_teacache = self.enable_magcache = self.enable_easycache = False
        self.teacache_state, self.magcache_state, self.easycache_state = CacheState(), CacheState(), CacheState()
        self.slg_blocks: Sequence[int] | None = None
        self.lora_scheduling_enabled = False
        self.rope_func = "default"
        self.audio_model: nn.Module | None = None

        patch = math.prod(self.patch_size)
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(Linear(text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        sizes = (dim, ffn_dim, num_heads)
        self.vace_layers = vace_layers
        if vace_layers is None:
            self.blocks = nn.ModuleList(
                WanAttentionBlock(
                    *sizes, block_idx=i, face_fuser_block=i in face_layers, is_controlled=i in control_layers
                )
                for i in range(num_layers)
            )
        else:
            place = {layer: hint for hint, layer in enumerate(vace_layers)}
            self.vace_blocks = nn.ModuleList(VaceWanAttentionBlock(*sizes, block_id=i) for i in vace_layers)
            self.vace_patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
            self.blocks = nn.ModuleList(
                BaseWanAttentionBlock(*sizes, block_id=place.get(i), block_idx=i) for i in range(num_layers)
            )
        if face_layers:
            self.face_encoder = Linear(dim, dim)
        if has_image:
            self.img_emb = Linear(text_dim, dim)
        if has_beside:
            beside.attach(self, dim)
        self.head = Head(dim, out_dim * patch)

    def block_swap(
        self,
        blocks_to_swap: int,
        offload_txt_emb: bool = False,
        offload_img_emb: bool = False,
        vace_blocks_to_swap: int | None = None,
        prefetch_blocks: int = 0,
        block_swap_debug: bool = False,
    ) -> None:
        """Places the blocks for a run, the last `blocks_to_swap` on the host; what is not given is off from then on."""
        self.blocks_to_swap = _place(self.blocks, blocks_to_swap, self)
        self.prefetch_blocks, self.block_swap_debug = prefetch_blocks, block_swap_debug
        self.offload_img_emb, self.offload_txt_emb = offload_img_emb, offload_txt_emb
        if vace_blocks_to_swap == 0:
            vace_blocks_to_swap = 1
        if vace_blocks_to_swap > 0 and self.vace_layers is not None:
            self.vace_blocks_to_swap = _place(self.vace_blocks, vace_blocks_to_swap, self)

    def forward_vace(
        self, x: torch.Tensor, vace_context: Sequence[torch.Tensor], seq_len: int, kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The hint of each VACE block, on the host if VACE blocks are swapped."""
        c = torch.cat([self.vace_patch_embedding(u.unsqueeze(0).float()).flatten(2) for u in vace_context])
        c = c.transpose(1, 2).to(x.dtype)
        is_swapping = self.vace_blocks_to_swap > 0
        start = len(self.vace_blocks) - (self.vace_blocks_to_swap if is_swapping else 0)
        hints = []
        for index, block in enumerate(self.vace_blocks):
            comes_and_goes = is_swapping and index >= start
            if comes_and_goes:
                block.to(self.main_device)
            if index == 0:
                c = block.before_proj(c) + x
            # The method itself, so that no hook on the block runs.
            c = block.forward(c, **kwargs)[0]
            hint_device = self.offload_device if self.vace_blocks_to_swap > 0 else self.main_device
            hints.append(block.after_proj(c).to(hint_device, non_blocking=self.use_non_blocking))
            if comes_and_goes:
                block.to(self.offload_device, non_blocking=self.use_non_blocking)
        return hints

    def forward(
        self,
        x: Sequence[torch.Tensor],
        t: torch.Tensor,
        context: Sequence[torch.Tensor],
        seq_len: int,
        is_uncond: bool = False,
        current_step_percentage: float = 0.0,
        current_step: int = 0,
        clip_fea: torch.Tensor | None = None,
        pred_id: int | None = None,
        vace_data: Sequence[dict[str, Any]] | None = None,
        wananim_face_pixel_values: torch.Tensor | None = None,
        lynx_embeds: dict[str, Any] | None = None,
        x_ovi: torch.Tensor | None = None,
        dual_control_input: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Any:
        """The prediction `(channels, frames, rows, columns)` for each of `x`; see `_result` for Lynx's pass."""
        if self.lora_scheduling_enabled:
            update_lora_step(self, current_step)
        x, grid, e, e0 = self._embed(x, t)
        context = self._embed_context(context, clip_fea)
        motion = self._embed_face(wananim_face_pixel_values)
        dense = None if dual_control_input is None else dual_control_input["dense"]
        x, pred_id, is_due = ask_cache(self, x, pred_id, current_step)
        original = kept_input(self, x, is_due=is_due)
        if not is_due:
            return self._result(x, grid, e, x_ovi, pred_id)

        kwargs: dict[str, Any] = {"e": e0, "context": context, "transformer_options": transformer_options}
        self._add_hints(kwargs, x, vace_data, seq_len, current_step_percentage)
        is_extracting, features = _lynx(lynx_embeds, is_uncond=is_uncond)

        x = beside.before_blocks(self, x)
        is_swapping = self.blocks_to_swap > 0
        # What the prefetch of each block has recorded. Without an accelerator there is none, and nothing is moved.
        events = [[] for _ in self.blocks] if self.main_device.type != "cpu" else None
        start = len(self.blocks) - (self.blocks_to_swap if is_swapping and events is not None else 0)
        for b, block in enumerate(self.blocks):
            mm.throw_exception_if_processing_interrupted()
            feature = None if is_extracting else features.get(b)
            self._prefetch(b, start, events)
            if self.blocks_to_swap > 0 and b >= start:
                block.to(self.main_device)
            if self.slg_blocks is not None and b in self.slg_blocks and is_uncond:
                continue
            x, _, feature, x_ovi = block(
                x, lynx_ref_feature=feature, x_ovi=x_ovi, lynx_ref_feature_extractor=is_extracting, **kwargs
            )
            if dense is not None and hasattr(block, "control_blocks_dense"):
                dense = block.control_blocks_dense(dense)
                x = x + block.control_combine_linears(dense) * dual_control_input["strength"]
            if motion is not None and block.has_face_fuser_block:
                x = x + block.fuser_block(x, motion)
            x = beside.after_block(self, b, x)
            if self.blocks_to_swap > 0 and b >= start:
                block.to(self.offload_device, non_blocking=self.use_non_blocking)
            if is_extracting:
                features[b] = feature
        if is_extracting:
            return features
        keep_output(self, original, x, pred_id)
        return self._result(x, grid, e, x_ovi, pred_id)

    def _embed(self, x: Sequence[torch.Tensor], t: torch.Tensor) -> tuple[Any, ...]:
        patches = torch.cat([self.patch_embedding(u.unsqueeze(0).float()) for u in x])
        frequencies = torch.arange(self.freq_dim // 2, device=t.device, dtype=torch.float32).neg().exp()
        angles = t.float().unsqueeze(1) * frequencies
        wave = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.base_dtype)
        e = self.time_embedding(wave)
        e0 = self.time_projection(e).unflatten(1, (6, self.dim))
        return patches.flatten(2).transpose(1, 2).to(self.base_dtype), patches.shape[2:], e, e0

    def _embed_context(self, context: Sequence[torch.Tensor], clip_fea: torch.Tensor | None) -> torch.Tensor:
        if self.offload_txt_emb:
            self.text_embedding.to(self.main_device)
        padded = torch.stack([torch.cat([u, u.new_zeros(self.text_len - len(u), u.shape[1])]) for u in context])
        text = self.text_embedding(padded.to(self.base_dtype))
        if self.offload_txt_emb:
            self.text_embedding.to(self.offload_device, non_blocking=self.use_non_blocking)
        if clip_fea is None:
            return text
        if self.offload_img_emb:
            self.img_emb.to(self.main_device)
        image = self.img_emb(clip_fea.to(self.base_dtype))
        if self.offload_img_emb:
            self.img_emb.to(self.offload_device, non_blocking=self.use_non_blocking)
        return torch.cat([image, text], dim=1)

    def _embed_face(self, pixels: torch.Tensor | None) -> torch.Tensor | None:
        if pixels is None:
            return None
        self.face_encoder.to(self.main_device)
        motion = self.face_encoder(pixels.to(self.base_dtype))
        self.face_encoder.to(self.offload_device)
        return motion

    def _add_hints(
        self,
        kwargs: dict[str, Any],
        x: torch.Tensor,
        vace_data: Sequence[dict[str, Any]] | None,
        seq_len: int,
        percentage: float,
    ) -> None:
        if vace_data is None:
            return
        active = [data for data in vace_data if data["start"] <= percentage <= data["end"]]
        kwargs["vace_hints"] = [self.forward_vace(x, data["context"], seq_len, dict(kwargs)) for data in active]
        kwargs["vace_context_scale"] = [data["scale"] for data in active]

    def _prefetch(self, b: int, start: int, events: list[list[int]] | None) -> None:
        if self.blocks_to_swap <= 0 or events is None:
            return
        for ahead in range(b + 1, min(b + 1 + self.prefetch_blocks, len(self.blocks))):
            if ahead >= start:
                self.blocks[ahead].to(self.main_device, non_blocking=self.use_non_blocking)
                events[ahead].append(b)

    def _result(
        self, x: torch.Tensor, grid: torch.Size, e: torch.Tensor, x_ovi: torch.Tensor | None, pred_id: int | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, int | None]:
        """Video, sound, and the number under which a cache knows the prediction. Lynx's pass gives features instead."""
        keep_end(self, x, pred_id)
        frames, rows, columns = grid
        patches = self.head(x, e).unflatten(1, (frames, rows, columns)).unflatten(-1, (self.out_dim, 2, 2))
        video = patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, self.out_dim, frames, rows * 2, columns * 2)
        return [one.float() for one in video], x_ovi, pred_id


def _place(blocks: nn.ModuleList, count: int, model: WanModel) -> int:
    """Puts the last `count` blocks on the host and the others on the device; returns the count within its bounds."""
    count = max(0, min(count, len(blocks)))
    for index, block in enumerate(blocks):
        if index < len(blocks) - count:
            block.to(model.main_device)
        else:
            block.to(model.offload_device, non_blocking=model.use_non_blocking)
    return count


def _lynx(embeds: dict[str, Any] | None, *, is_uncond: bool) -> tuple[bool, dict[int, torch.Tensor]]:
    """Whether this forward gathers features, and those gathered before."""
    if embeds is None:
        return False, {}
    return embeds["ref_feature_extractor"], embeds.get("ref_buffer_uncond" if is_uncond else "ref_buffer") or {}
