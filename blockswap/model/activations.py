"""Device memory that a forward of a Wan transformer takes above its weights, by sizes and options; pure.

The terms are what ComfyUI-WanVideoWrapper's code holds at the same time, read from wanvideo/modules/model.py (1.4.7)
and measured by following every storage of its forward (tests/activations; docs/predictions.md has the table). The unit
is one value for each token and channel. A block leaves nothing behind but the residual stream, so that the peak is that
of one block, and the largest of its phases.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .wan import WanArchitecture

ELEMENT_BYTES = 2
"""Size of an activation's element: bf16 and fp16, in which fp8 and GGUF models compute too."""

TEXT_TOKENS = 512
"""Length to which Wan pads its text embedding (text_len in Wan's configuration)."""

FLOAT, DOUBLE = 2, 4
"""Units of a float32 and of a float64 copy."""

SHORT_SEQUENCE = 8192
"""Tokens up to which the wrapper's feed-forward is not cut in chunks (ffn_chunked)."""

LONGCAT_WIDTH = 4096
"""Width by which the wrapper knows LongCat, whose blocks are other ones."""

MODULATION = 6
"""Shift, scale and gate, for the attention and for the feed-forward."""


class Rope(enum.Enum):
    """How rotary embeddings are applied to queries and keys: the sampler's `rope_function`, and the kernel."""

    COMFY = "comfy"
    """In float32, by torch's operators: comfy-kitchen's eager backend, which torch for CUDA 12 gets."""

    FUSED = "fused"
    """The same function by comfy-kitchen's CUDA kernel, which torch for CUDA 13 gets."""

    CHUNKED = "comfy_chunked"
    """As COMFY in two halves; the feed-forward runs in four quarters then."""

    DEFAULT = "default"
    """By complex numbers of two float64."""


class Attention(enum.Enum):
    """Kernels of attention that differ in what they allocate."""

    SDPA = "sdpa"
    SAGE = "sage"
    FLASH = "flash"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardOptions:
    """What changes the memory of a forward, except for the sizes.

    Attributes:
        attention: The kernel of self-attention.
        rope: The sampler's rope function.
        sequences: Sequences in a batch: 2 if both passes of CFG are one forward.
        per_token: Each frame has a timestep of its own (5B image to video, diffusion forcing); then the modulation is
            one for each token, which the sequences of a batch share.
        wide: Norms are in float32: modulation stored in float32, or fp8 weights under autocast.
        weight_copies: Copies of a matrix that exist while it is prepared: dequantised, scaled, with a LoRA added.
        vace_inputs: Controls that the VACE blocks run for; 0 if they do not run.
        vace_hints: Hints stay on the device for the main blocks.
        speakers: Voices of MultiTalk that masks tell apart.
        frames: Latent frames, for the attention map of several speakers.
        speech: The model is S2V: its blocks handle two parts of the sequence apart.
        is_diffusers: The code is diffusers' WanTransformer3DModel; then only `sequences` and `per_token` count.
    """

    attention: Attention = Attention.SDPA
    rope: Rope = Rope.COMFY
    sequences: int = 1
    per_token: bool = False
    wide: bool = False
    weight_copies: int = 0
    vace_inputs: int = 1
    vace_hints: bool = True
    speakers: int = 1
    frames: int | None = None
    speech: bool = False
    is_diffusers: bool = False


def weight_copies(*, dequantised: bool, fp8: bool, lora: bool) -> int:
    """Copies of a matrix while the wrapper prepares it (CustomLinear, or autocast).

    Args:
        dequantised: It is scaled fp8 or GGUF: dequantised, and that in its own type or scaled.
        fp8: It is fp8: cast.
        lora: It has a LoRA: its product, that with its strength, and the sum, beside one of the copies before.
    """
    if lora:
        return 3 + (dequantised or fp8)
    return 2 if dequantised else int(fp8)


WRAPPER = ForwardOptions()
"""As the wrapper's nodes run a bf16 model by their defaults."""

DIFFUSERS = ForwardOptions(is_diffusers=True)


def activation_bytes(architecture: WanArchitecture, tokens: int, options: ForwardOptions = DIFFUSERS) -> int:
    """Expected device memory of a forward above the weights, used until a forward has been measured.

    Args:
        architecture: The model's sizes.
        tokens: Length of all sequences of a batch together.
        options: How the forward is run; by default as diffusers does, which needs more than the wrapper.
    """
    unit = tokens * architecture.width * ELEMENT_BYTES
    if options.is_diffusers:
        return _diffusers(architecture, tokens, unit, options)
    phases = [_queries(options), _attention(architecture, options), *_feed_forward(architecture, tokens, options)]
    nbytes = max(int(units * unit) + copies * _largest_matrix(architecture) for units, copies in phases)
    nbytes = max(nbytes, _speakers(architecture, tokens, options))
    # The projected timesteps, expanded, and their sum with the block's modulation. LongCat keeps one for each frame.
    is_expanded = options.per_token and architecture.width != LONGCAT_WIDTH
    held = _vace(architecture, options) + (2 * MODULATION / options.sequences if is_expanded else 0)
    return nbytes + int(held * unit) + _beside(architecture, tokens, options)


Phase = tuple[float, int]
"""Units, and copies of the largest matrix."""


def _queries(options: ForwardOptions) -> Phase:
    """Keys are made while queries exist: with the residual stream and the modulated input, three units are held."""
    held = 3
    norms = 3 * (FLOAT if options.wide else 1)  # of WanRMSNorm: its input, the normed, the weighted
    turned = {
        Rope.COMFY: 1 + FLOAT + FLOAT + 1,  # the normed, in float32, the turned, and that in its own type
        Rope.CHUNKED: 1 + (1 + FLOAT + FLOAT + 1) / 2,  # all keys, and a half of it
        Rope.FUSED: 2,
        Rope.DEFAULT: 2 + DOUBLE + DOUBLE + 1,  # keys and values exist; the turned and their stack are float64
    }[options.rope]
    return held + max(turned, norms / 2 + 1 if options.rope is Rope.CHUNKED else norms), 0


def _attention(architecture: WanArchitecture, options: ForwardOptions) -> Phase:
    """The residual stream, queries, keys and values, and what the kernel allocates."""
    logsumexp = architecture.heads * 4 / (architecture.width * ELEMENT_BYTES)
    kernel = {
        Attention.SDPA: 1 + logsumexp,
        # SageAttention 2 on Ada and Blackwell (sageattn_qk_int8_pv_fp8_cuda in sageattention/core.py): queries and keys
        # in int8, the output, then the values transposed and in fp8.
        Attention.SAGE: 0.5 + 0.5 + 1 + 1 + 0.5,
        # attention_flash.py joins the keys and values of a batch, which copies them.
        Attention.FLASH: 2 + 1 + logsumexp,
    }[options.attention]
    return 4 + max(kernel, 2), 0  # 2: the output before and after the last projection


def _feed_forward(architecture: WanArchitecture, tokens: int, options: ForwardOptions) -> list[Phase]:
    """The residual stream, the modulated input, and the hidden channels before and after the activation."""
    ratio = architecture.ffn_width / architecture.width
    copies = options.weight_copies
    if architecture.width == LONGCAT_WIDTH:
        # Two halves of a gated pair (FeedForwardSwiGLU), the input in float32 too, and the residual stream twice.
        return [(2 + FLOAT + 1 + 0.5 + 3 * ratio / 2, 0), (2 + FLOAT + 1 + 0.5 + ratio / 2, copies)]
    if options.speech:
        # The caller's residual stream, and the two parts of the gated attention and of the input, apart and joined.
        return [(5 + 2 * ratio, 0), (5 + ratio, copies)]
    if options.rope is Rope.CHUNKED and tokens > SHORT_SEQUENCE * options.sequences:
        # A chunk of one sequence is a view; of several it is a copy. The results of the chunks before are held.
        copied = 0.25 if options.sequences > 1 else 0
        hidden = max(2.75 + copied + ratio / 2, 4)
        return [(hidden, 0), (2.75 + copied + ratio / 4, copies)]
    held = 2 + (FLOAT if options.wide else 0)
    return [(held + 2 * ratio, 0), (held + ratio, copies), (held + ratio + 1, min(copies, 1))]


def _largest_matrix(architecture: WanArchitecture) -> int:
    return architecture.width * architecture.ffn_width * ELEMENT_BYTES


def _speakers(architecture: WanArchitecture, tokens: int, options: ForwardOptions) -> int:
    """The map of each token's attention to the first frame (get_attn_map_with_target), for half of the heads and a
    quarter of the tokens, three times, beside queries, keys, values, output and residual stream.
    """
    if options.speakers < 2 or not options.frames:  # noqa: PLR2004 - masks tell two or more apart
        return 0
    in_frame = tokens // options.sequences // options.frames
    one = architecture.heads // 2 * (tokens // 4) * in_frame * ELEMENT_BYTES
    return 3 * one + int(5.5 * tokens * architecture.width * ELEMENT_BYTES)


def _vace(architecture: WanArchitecture, options: ForwardOptions) -> float:
    """Units beside the last VACE block: the main residual stream, the hints before, and the embedded control, which a
    batch shares.
    """
    if not architecture.vace_blocks or not options.vace_inputs:
        return 0
    hints = architecture.vace_blocks * options.vace_inputs - 1 if options.vace_hints else 0
    return 1 + 1 / options.sequences + hints


def _beside(architecture: WanArchitecture, tokens: int, options: ForwardOptions) -> int:
    """The text of each sequence, and the rotary frequencies of one: 2 x 2 float32 or a complex number of two float64
    for each pair of channels of a head.
    """
    frequencies = tokens // options.sequences * _head_width(architecture) // 2 * 16
    return _text(architecture, options) + frequencies


def _text(architecture: WanArchitecture, options: ForwardOptions) -> int:
    return options.sequences * TEXT_TOKENS * architecture.width * ELEMENT_BYTES


def _head_width(architecture: WanArchitecture) -> int:
    return architecture.width // max(1, architecture.heads)


def _diffusers(architecture: WanArchitecture, tokens: int, unit: int, options: ForwardOptions) -> int:
    """Of WanTransformer3DModel (transformer_wan.py, 0.42.1). A block's caller holds the residual stream a second time,
    the norm of keys is in float32, and so is the modulation: with one for each token there are the projected timesteps,
    their float32 and the sum with the block's table.
    """
    ratio, text = architecture.ffn_width / architecture.width, _text(architecture, options)
    modulation = MODULATION * (1 + FLOAT) if options.per_token else 0
    keys = int(11 * unit) + 3 * text  # beside the text its keys and values
    feed_forward = int((4 + 2 * ratio) * unit) + text
    modulated = (2 + MODULATION * FLOAT) * unit + text if options.per_token else 0
    frequencies = tokens // options.sequences * _head_width(architecture) * 2 * ELEMENT_BYTES
    return modulation * unit + max(keys, feed_forward, modulated) + frequencies
