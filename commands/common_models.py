"""The models that people run most, described by the shapes of their tensors: for tables without a model's file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..blockswap.model.recognise import CheckpointProfile, TensorInfo, profile_tensors

DTYPES = {"fp16": "F16", "fp8": "F8_E4M3", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K"}
"""As files name these types."""

BITS = {"fp16": 16.0, "fp8": 8.0, "Q8_0": 8.5, "Q4_K_M": 4.85}
"""Bits per weight of the blocks' matrices. Q4_K_M has 6.56 (Q6_K) for a sixth of them and 4.5 (Q4_K) for the others."""

TEXT_WIDTH, IMAGE_WIDTH, AUDIO_WIDTH, FREQUENCIES = 4096, 1280, 768, 256
"""Channels of the text encoder (umT5-xxl), the image encoder (CLIP ViT-H), wav2vec2 and the time embedding."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonModel:
    """A published Wan transformer.

    Attributes:
        name: As people call it, with the stored type.
        kind: A key of `BITS`.
        width: Channels of a token.
        ffn: Channels inside the feed-forward layers.
        blocks: Number of blocks.
        channels: Channels that go in; the output has 48 for Wan 2.2 5B and 16 for the others.
        takes_image: It has Wan 2.1's image attention.
        vace: Number of VACE blocks.
        takes_audio: It has InfiniteTalk's audio attention.
    """

    name: str
    kind: str
    width: int = 5120
    ffn: int = 13824
    blocks: int = 40
    channels: int = 16
    takes_image: bool = False
    vace: int = 0
    takes_audio: bool = False

    def profile(self) -> CheckpointProfile:
        """What the header of its file would give."""
        stored = {name: self._stored(name, shape) for name, shape in self._shapes().items()}
        return profile_tensors(self.name, stored)

    def _stored(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        is_quantised = "blocks." in name and len(shape) == 2  # noqa: PLR2004 - matrices
        kind = self.kind if is_quantised else "fp16"
        # The loader copies every tensor of a GGUF file, and maps those of others.
        return TensorInfo(
            shape, DTYPES[kind], int(math.prod(shape) * BITS[kind] / 8), in_file=not self.kind.startswith("Q")
        )

    def _shapes(self) -> Shapes:
        width, outputs = self.width, 48 if self.channels == 48 else 16  # noqa: PLR2004 - 5B's VAE
        shapes: Shapes = {"patch_embedding.weight": (width, self.channels, 1, 2, 2), "patch_embedding.bias": (width,)}
        shapes["head.modulation"] = (1, 2, width)
        shapes |= _linear("text_embedding.0", width, TEXT_WIDTH) | _linear("text_embedding.2", width, width)
        shapes |= _linear("time_embedding.0", width, FREQUENCIES) | _linear("time_embedding.2", width, width)
        shapes |= _linear("time_projection.1", 6 * width, width) | _linear("head.head", 4 * outputs, width)
        if self.takes_image:
            shapes |= _linear("img_emb.proj.1", IMAGE_WIDTH, IMAGE_WIDTH) | _linear(
                "img_emb.proj.3", width, IMAGE_WIDTH
            )
        for number in range(self.blocks):
            shapes |= {f"blocks.{number}.{name}": shape for name, shape in self._block().items()}
        for number in range(self.vace):
            shapes |= {f"vace_blocks.{number}.{name}": shape for name, shape in self._vace_block(number).items()}
        return shapes

    def _block(self) -> Shapes:
        width = self.width
        shapes: Shapes = {"modulation": (1, 6, width), "norm3.weight": (width,), "norm3.bias": (width,)}
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= _linear(f"{attention}.{name}", width, width)
            shapes |= {f"{attention}.norm_{name}.weight": (width,) for name in "qk"}
        if self.takes_image:
            shapes |= _linear("cross_attn.k_img", width, width) | _linear("cross_attn.v_img", width, width)
            shapes["cross_attn.norm_k_img.weight"] = (width,)
        if self.takes_audio:
            shapes |= _linear("audio_cross_attn.q_linear", width, width)
            shapes |= _linear("audio_cross_attn.kv_linear", 2 * width, AUDIO_WIDTH)
            shapes |= _linear("audio_cross_attn.proj", width, width)
            shapes |= {"norm_x.weight": (width,), "norm_x.bias": (width,)}
        return shapes | _linear("ffn.0", self.ffn, width) | _linear("ffn.2", width, self.ffn)

    def _vace_block(self, number: int) -> Shapes:
        first = _linear("before_proj", self.width, self.width) if number == 0 else {}
        return self._block() | first | _linear("after_proj", self.width, self.width)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


COMMON_MODELS = (
    *(CommonModel(name=f"Wan 2.1/2.2 14B text to video, {kind}", kind=kind) for kind in ("Q4_K_M", "fp8", "fp16")),
    CommonModel(name="Wan 2.2 14B image to video, fp8", kind="fp8", channels=36),
    CommonModel(name="Wan 2.1 14B image to video, fp8", kind="fp8", channels=36, takes_image=True),
    CommonModel(name="InfiniteTalk 14B, fp8", kind="fp8", channels=36, takes_image=True, takes_audio=True),
    CommonModel(name="Wan 2.1 14B VACE, fp8", kind="fp8", vace=8),
    CommonModel(name="Wan 2.2 5B, fp16", kind="fp16", width=3072, ffn=14336, blocks=30, channels=48),
    CommonModel(name="Wan 2.1 1.3B, fp16", kind="fp16", width=1536, ffn=8960, blocks=30),
)
