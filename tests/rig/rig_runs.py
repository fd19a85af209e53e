"""Runs of the variants, each made once and looked at by several tests."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from comfy_client import Comfy
from rig_variants import BLOCKS, VARIANTS, Case, native, ours
from wanvideo_enhanced_blockswap.blockswap.checkpoint.wan_file import read_checkpoint
from wanvideo_enhanced_blockswap.blockswap.model.recognise import CheckpointProfile

HALF = BLOCKS // 2

COUNTS = (1, HALF, BLOCKS, "auto")
"""What our node is asked for."""


class Runs:
    """Runs variants in one process.

    Args:
        comfy: The process.
        cases: The variants by name.
    """

    def __init__(self, comfy: Comfy, cases: Mapping[str, Case] = VARIANTS) -> None:
        self._comfy = comfy
        self._cases = cases
        self._made: dict[tuple[str, object], SimpleNamespace] = {}

    def of(self, variant: str, count: object) -> SimpleNamespace:
        """What came of a variant that is swapped by us.

        Args:
            variant: Its name.
            count: One of COUNTS.
        """
        if count != "auto":
            return self._once(variant, count, swap=ours(count))
        # A device that the model without a quarter of its blocks would fill: automatic tuning has to swap. With
        # load_device=main_device, the loader needs room for all of them.
        unswapped = self.unswapped(variant)
        limit_bytes = unswapped.peak_bytes - (0 if variant == "main_device" else sum(unswapped.block_bytes) // 4)
        return self._once(variant, count, swap=ours(None), limit_bytes=limit_bytes)

    def unswapped(self, variant: str) -> SimpleNamespace:
        """What came of it without any swapping."""
        return self._once(variant, "unswapped")

    def changed(self, variant: str, **changes: object) -> SimpleNamespace:
        """What came of it without any swapping and with some keys of the case changed."""
        return self._once(variant, ("unswapped", *changes.items()), **changes)

    def resident(self, variant: str) -> SimpleNamespace:
        """What came of it with our node and all blocks on the device."""
        return self._once(variant, 0, swap=ours(0))

    def native(self, variant: str) -> SimpleNamespace:
        """What came of it with all blocks swapped by the wrapper, which leaves out one of those asked for in unpatched
        models.
        """
        return self._once(variant, "native", swap=native(BLOCKS + 1))

    def file(self, variant: str) -> CheckpointProfile:
        """What the files of a variant say, as `plan` reads them; a run has made them."""
        load, lora = self._cases[variant]["load"], self._cases[variant].get("lora")
        folder = self._comfy.models / "diffusion_models"
        inputs = [value["inputs"] for value in load.values() if isinstance(value, dict)]
        modules = [*(one["model"] for one in inputs), *([load["extra_model"]] if "extra_model" in load else [])]
        return read_checkpoint(
            folder / load["model"],
            modules=[folder / name for name in modules],
            loras=[] if lora is None else [self._comfy.models / "loras" / lora["lora"]],
        )

    def _once(self, variant: str, how: object, **changes: object) -> SimpleNamespace:
        if (variant, how) not in self._made:
            outcome = self._comfy.run(self._cases[variant], **changes)
            outcome.how = how
            self._made[variant, how] = outcome
        outcome = self._made[variant, how]
        assert not hasattr(outcome, "error"), outcome.error
        return outcome
