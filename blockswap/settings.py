"""SwapSettings: the widgets of the node as typed, validated fields; to and from BLOCKSWAPARGS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from .errors import SettingsError

SETTINGS_KEY = "wanvideo_enhanced_blockswap"
"""Our own key in BLOCKSWAPARGS; the wrapper passes on keys that it does not know."""

NODE_KEY = "wanvideo_enhanced_blockswap_node"
"""Key of the id of the node in its workflow, where progress is shown."""

EVERY_BLOCK = 10_000
"""A block count above any model's, with which the wrapper loads every block to the host."""


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a numeric widget accepts, both ends included."""

    lowest: float
    highest: float


RANGES = {
    "blocks_to_swap": Range(0, 48),
    "vram_threshold_percent": Range(30.0, 90.0),
    "num_cuda_streams": Range(1, 16),
    "bandwidth_target": Range(0.1, 1.0),
    "vace_blocks_to_swap": Range(0, 15),
}
"""Ranges of the numeric widgets; saved workflows rely on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """The user's settings; one field per widget, in the order of saved workflows.

    Attributes:
        blocks_to_swap: Number of blocks to swap if `auto_hardware_tuning` is off. The plan cuts a count above the
            model's, and says so.
        enable_cuda_optimization: Copies overlap compute on streams of their own; off: copies use the compute stream.
        enable_dram_optimization: Streamed weights are page-locked; off: pageable, with slower copies.
        auto_hardware_tuning: Budget, link and GPU determine count, streams and share of VRAM.
        vram_threshold_percent: Upper limit of VRAM use once the weights are placed, in percent of the card.
        num_cuda_streams: Number of copy streams if `auto_hardware_tuning` is off.
        bandwidth_target: Share of the available VRAM that block weights and window may fill, if
            `auto_hardware_tuning` is off.
        offload_txt_emb: Passed to the wrapper: the text embedding layers go to the host after use.
        offload_img_emb: Passed to the wrapper: the image embedding layers go to the host after use.
        vace_blocks_to_swap: Number of VACE blocks to swap if `auto_hardware_tuning` is off.
        debug_mode: Adds a table of blocks, checksums and a trace file.

    Raises:
        SettingsError: A value has the wrong type, or is outside `RANGES`.
    """

    blocks_to_swap: int = 0
    enable_cuda_optimization: bool = True
    enable_dram_optimization: bool = True
    auto_hardware_tuning: bool = True
    vram_threshold_percent: float = 50.0
    num_cuda_streams: int = 8
    bandwidth_target: float = 0.8
    offload_txt_emb: bool = False
    offload_img_emb: bool = False
    vace_blocks_to_swap: int = 0
    debug_mode: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, str(field.type), getattr(self, field.name))

    @property
    def of_the_plan(self) -> SwapSettings:
        """The same settings, with those that no plan depends on at their defaults."""
        return replace(self, offload_txt_emb=False, offload_img_emb=False, debug_mode=False)

    def to_blockswapargs(self, *, node: str | None = None) -> dict[str, object]:
        """BLOCKSWAPARGS for the wrapper: every block goes to the host, and our settings are plain data in it.

        Args:
            node: Id of the node that makes them; None if there is none.
        """
        return {
            "blocks_to_swap": EVERY_BLOCK,
            "vace_blocks_to_swap": EVERY_BLOCK,
            "offload_txt_emb": self.offload_txt_emb,
            "offload_img_emb": self.offload_img_emb,
            "use_non_blocking": False,
            "prefetch_blocks": 0,
            "block_swap_debug": False,
            SETTINGS_KEY: {field.name: getattr(self, field.name) for field in fields(self)},
            NODE_KEY: node,
        }

    @classmethod
    def from_blockswapargs(cls, arguments: Mapping[str, object]) -> SwapSettings | None:
        """The settings from `to_blockswapargs`; None if another node made the arguments.

        Fields that an older version did not write get their defaults; fields of a newer version are ignored.

        Raises:
            SettingsError: The settings are not a mapping, or a value is invalid.
        """
        stored = arguments.get(SETTINGS_KEY)
        if stored is None:
            return None
        if not isinstance(stored, Mapping):
            raise SettingsError(
                f"BLOCKSWAPARGS[{SETTINGS_KEY!r}]: expected a mapping of settings, got {type(stored).__name__}; "
                "connect the WanVideo Enhanced BlockSwap node itself"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


def is_ours(arguments: object) -> bool:
    """Whether BLOCKSWAPARGS come from our node."""
    return isinstance(arguments, Mapping) and arguments.get(SETTINGS_KEY) is not None


def node_of(arguments: object) -> str | None:
    """The id of the node that made BLOCKSWAPARGS; None if they hold none."""
    node = arguments.get(NODE_KEY) if isinstance(arguments, Mapping) else None
    return node if isinstance(node, str) else None


def _check(name: str, kind: str, value: object) -> None:
    if kind == "bool":
        expected, is_valid = "True or False", isinstance(value, bool)
    else:
        lowest, highest = RANGES[name].lowest, RANGES[name].highest
        expected = f"a {'whole ' if kind == 'int' else ''}number from {lowest} to {highest}"
        is_number = isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
        is_valid = is_number and lowest <= value <= highest  # type: ignore[operator]
    if not is_valid:
        raise SettingsError(f"{name}: expected {expected}, got {value!r}; set the widget to such a value")
