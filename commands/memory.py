"""The budget of a card that may not be here: its memory less what lies outside the blocks."""

from __future__ import annotations

from ..blockswap.errors import SettingsError
from ..blockswap.model.layout import ModelProfile
from ..blockswap.plan.swap_plan import PlanInputs
from ..hardware import HostMemory, format_bytes


def card_inputs(
    profile: ModelProfile,
    vram_bytes: int,
    host: HostMemory,
    *,
    held_bytes: int,
) -> PlanInputs:
    """What a plan is made from on a card of `vram_bytes` that holds nothing but the model.

    Args:
        profile: The model.
        vram_bytes: Memory of the card.
        host: Memory of the host.
        held_bytes: Bytes of the blocks that the host holds already.

    Raises:
        SettingsError: What lies outside the blocks alone is larger than the card.
    """
    if vram_bytes < profile.other_bytes:
        raise SettingsError(
            f"--vram expects more than the {format_bytes(profile.other_bytes)} that lie outside the blocks but got "
            f"{format_bytes(vram_bytes)}; take a larger GPU or a smaller model"
        )
    return PlanInputs(
        device_total_bytes=vram_bytes,
        device_free_bytes=vram_bytes - profile.other_bytes,
        host_available_bytes=host.available_bytes,
        pin_budget_bytes=host.pin_budget_bytes,
        host_held_bytes=held_bytes,
    )
