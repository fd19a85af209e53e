"""The forwards that are measured: architectures, and options of the wrapper that change what a forward holds."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

FRAMES, SIDE = 40, 100
"""Of the latents, unless a case has fewer frames: 100,000 tokens in patches of (1, 2, 2)."""

SIZES = {
    "14B": (5120, 13824, 40, 16),
    "5B": (3072, 14336, 24, 48),
    "1.3B": (1536, 8960, 12, 16),
    "LongCat": (4096, 11008, 32, 16),
}
"""Width, feed-forward width, heads, channels of the latents."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A forward of the wrapper.

    Attributes:
        size: One of SIZES.
        kind: t2v, i2v, vace, multitalk, s2v or animate.
        attention: The loader's attention_mode.
        rope: The sampler's rope_function.
        weights: bf16, fp16, fp8 (under autocast), fp8_scaled, gguf, or lora: bf16 with a LoRA that is not merged.
        per_token: A timestep for each frame.
        batched: Two sequences in one forward.
        fused_rope: The kernel of comfy-kitchen is there.
        float_modulation: Modulation and norms are stored in float32.
        lora: A LoRA that is not merged, on quantised weights.
        vace_blocks: Of a model of kind vace.
        vace_inputs: Controls.
        humans: Speakers of kind multitalk.
        frames: Latent frames.
    """

    size: str
    kind: str = "t2v"
    attention: str = "sdpa"
    rope: str = "comfy"
    weights: str = "bf16"
    per_token: bool = False
    batched: bool = False
    fused_rope: bool = False
    float_modulation: bool = False
    lora: bool = False
    vace_blocks: int = 2
    vace_inputs: int = 1
    humans: int = 1
    frames: int = FRAMES

    @property
    def tokens(self) -> int:
        """Of one sequence, without what the model adds."""
        return self.frames * (SIDE // 2) ** 2

    @property
    def name(self) -> str:
        """Its size, and what is not as usual."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "size"}
        changed = {name: value for name, value in others.items() if value != getattr(Case, name)}
        return " ".join([self.size, *(name if value is True else f"{name}={value}" for name, value in changed.items())])


def _grid() -> list[Case]:
    """The cells that must agree."""
    return [
        Case(size=size, kind=kind, attention=attention, rope=rope, per_token=per_token, batched=batched)
        for size, kind, attention, rope, per_token, batched in itertools.product(
            ("14B", "5B", "1.3B"),
            ("t2v", "vace"),
            ("sdpa", "sageattn"),
            ("comfy", "comfy_chunked"),
            (False, True),
            (False, True),
        )
    ]


OTHERS = [
    Case(size="14B", rope="default"),
    Case(size="14B", attention="sageattn", rope="default"),
    Case(size="14B", rope="default", per_token=True),
    Case(size="1.3B", rope="default"),
    Case(size="14B", fused_rope=True),
    Case(size="14B", fused_rope=True, attention="sageattn"),
    Case(size="14B", attention="flash_attn_2"),
    *[Case(size="14B", weights=weights, frames=1) for weights in ("bf16", "fp8", "gguf", "lora")],
    Case(size="14B", weights="fp8_scaled", frames=3),
    Case(size="14B", weights="fp8_scaled", lora=True, frames=3),
    Case(size="14B", weights="gguf", lora=True, frames=1),
    Case(size="14B", rope="comfy_chunked", frames=3),
    Case(size="14B", kind="multitalk", humans=2, frames=3),
    Case(size="14B", kind="animate", frames=9),
    *[Case(size="14B", weights=weights) for weights in ("fp16", "fp8", "fp8_scaled", "gguf", "lora")],
    *[Case(size="14B", weights=weights, rope="comfy_chunked") for weights in ("fp8", "fp8_scaled", "gguf", "lora")],
    Case(size="1.3B", weights="fp8"),
    Case(size="14B", weights="fp8", attention="sageattn"),
    Case(size="14B", float_modulation=True),
    Case(size="14B", float_modulation=True, attention="sageattn"),
    Case(size="14B", kind="i2v"),
    Case(size="14B", kind="i2v", attention="sageattn", rope="comfy_chunked"),
    Case(size="14B", kind="multitalk"),
    Case(size="14B", kind="multitalk", rope="comfy_chunked"),
    Case(size="14B", kind="multitalk", humans=2),
    Case(size="14B", kind="s2v"),
    Case(size="14B", kind="animate"),
    Case(size="14B", kind="vace", vace_inputs=2),
    Case(size="LongCat"),
    Case(size="LongCat", attention="sageattn"),
]

GRID = _grid()
CASES = GRID + OTHERS
