"""Cards by the name on the box or of the driver: which row each spelling finds, and that the rows are plausible."""

from __future__ import annotations

import re

import pytest
from wanvideo_enhanced_blockswap.hardware import GIB, Vendor
from wanvideo_enhanced_blockswap.hardware.cards import find_gpu, known_gpus, vendor_of

SPELLINGS = """
RTX 4090            | rtx 4090; NVIDIA GeForce RTX 4090; 4090; rtx4090 24 GB; RTX-4090; GeForce 4090 24GB
RTX 3060 12GB       | RTX 3060 12GB; 3060 12g; rtx3060-12gb
RTX 3060 12GB       | 3060 12; RTX3060-12GB OC; RTX 3060 LHR 12GB; MSI GeForce RTX 3060 Ventus 12G OC
RTX 5060 Ti 16GB    | 5060 ti 16; 5060Ti-16
RTX 4090            | eGPU RTX 4090; RTX 4090 (24GB VRAM); RTX™ 4090; GeForce RTX® 4090 Founders Edition
RTX 4070 Ti SUPER   | ASUS TUF RTX 4070 Ti SUPER OC; ASUS ROG 4070 Ti Super
RTX 4060 Ti 16GB    | 4060 Ti 16GB; rtx4060ti-16g; RTX4060TI16GB; NVIDIA GeForce RTX 4060 Ti 16GB
RTX 4070 Ti SUPER   | 4070 Ti Super; 4070 ti s; 4070TiS; NVIDIA GeForce RTX 4070 Ti SUPER
RTX 4080 SUPER      | 4080S; RTX 4080 Super
RTX 3080 12GB       | NVIDIA GeForce RTX 3080 12GB
RTX 3080 10GB       | 3080 10 GB
RTX 5070 Ti         | 5070ti; RTX 5070 TI 16 GB
RTX 5090 D          | NVIDIA GeForce RTX 5090 D
GTX 1080 Ti         | gtx1080ti; NVIDIA GeForce GTX 1080 Ti; GeForce GTX 1080 Ti 11GB
GTX 1060 6GB        | GeForce GTX 1060 6GB
GTX 1660 SUPER      | NVIDIA GeForce GTX 1660 SUPER; 1660 super
RTX 2080 Ti         | 2080ti; NVIDIA GeForce RTX 2080 Ti
TITAN X Pascal      | NVIDIA TITAN X (Pascal)
TITAN RTX           | NVIDIA TITAN RTX; titan rtx
RTX 3060 Laptop     | NVIDIA GeForce RTX 3060 Laptop GPU; 3060 mobile; 3060m; RTX 3060 Laptop
RTX 3080 Laptop 16GB| RTX 3080 Laptop 16GB
RTX 5090 Laptop     | NVIDIA GeForce RTX 5090 Laptop GPU
RTX 3060 Laptop     | RTX 3060 Max-Q
RTX 2080 SUPER Max-Q| NVIDIA GeForce RTX 2080 Super with Max-Q Design
RTX 2070 Laptop     | RTX 2070 mobile
RTX A5000 Laptop    | NVIDIA RTX A5000 Laptop GPU
RTX 5000 Ada Laptop | NVIDIA RTX 5000 Ada Generation Laptop GPU
RX 7700S            | AMD Radeon RX 7700S
GTX 1650            | GTX 1650 GDDR6
RTX A6000           | NVIDIA RTX A6000; A6000; rtx a6000 48gb
RTX A2000 12GB      | NVIDIA RTX A2000 12GB
RTX 6000 Ada        | NVIDIA RTX 6000 Ada Generation; 6000 Ada
RTX 4000 SFF Ada    | NVIDIA RTX 4000 SFF Ada Generation
Quadro RTX 6000     | Quadro RTX 6000; NVIDIA Quadro RTX 6000
RTX PRO 6000 Blackwell        | NVIDIA RTX PRO 6000 Blackwell Workstation Edition; RTX PRO 6000; pro 6000 96GB
RTX PRO 6000 Blackwell Max-Q  | NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition; RTX PRO 6000 max-q
RTX PRO 6000 Blackwell Server | NVIDIA RTX PRO 6000 Blackwell Server Edition
RTX PRO 4500 Blackwell        | NVIDIA RTX PRO 4500 Blackwell
T4                  | Tesla T4; nvidia t4
V100 SXM2 32GB      | Tesla V100-SXM2-32GB
V100 PCIe 16GB      | Tesla V100-PCIE-16GB
P40                 | Tesla P40
A10G                | NVIDIA A10G; A10G 24GB
A10                 | NVIDIA A10; A10 24GB
A40                 | NVIDIA A40
A100 80GB           | A100-SXM4-80GB; A100 80GB; NVIDIA A100 80GB PCIe; NVIDIA A100-SXM4-80GB
A100 40GB           | NVIDIA A100-PCIE-40GB; NVIDIA A100-SXM4-40GB
L40S                | NVIDIA L40S; l40s
H100 SXM            | NVIDIA H100 80GB HBM3; H100 SXM5 80GB
H100 PCIe           | NVIDIA H100 PCIe
H100 NVL            | NVIDIA H100 NVL; H100 94GB
H200                | nvidia h200; H200 141GB; H200 SXM
B200                | NVIDIA B200
RX 7900 XTX         | 7900xtx; AMD Radeon RX 7900 XTX; RX 7900 XTX 24GB
RX 7900 GRE         | AMD Radeon RX 7900 GRE
RX 6800             | AMD Radeon RX 6800; AMD Radeon RX 6800 [ZLUDA]
RX 6800M            | AMD Radeon RX 6800M
RX 9070 XT          | RX 9070 XT; 9070xt; AMD Radeon RX 9070 XT
RX 9060 XT 16GB     | 9060 XT 16GB
Radeon PRO W7900    | Radeon Pro W7900; AMD Radeon PRO W7900; W7900
Radeon AI PRO R9700 | AMD Radeon AI PRO R9700; R9700
Instinct MI300X     | MI300X; AMD Instinct MI300X; mi 300x
Instinct MI250X     | MI250X; MI250X 128GB
GB10                | NVIDIA GB10; DGX Spark
Jetson AGX Thor     | NVIDIA Thor; Jetson Thor
Radeon 8060S        | AMD Radeon 8060S Graphics; Strix Halo
Radeon 780M         | AMD Radeon 780M Graphics
Apple M4 Max        | M4 Max; Apple M4 Max
Arc B580            | B580; Intel(R) Arc(TM) B580 Graphics; Arc B580 12GB
"""
FOUND = [
    pytest.param(spelling.strip(), row.strip(), id=spelling.strip())
    for row, spellings in (line.split("|") for line in SPELLINGS.strip().splitlines())
    for spelling in spellings.split(";")
]


@pytest.mark.parametrize(("spelling", "row"), FOUND)
def test_a_card_is_found_however_its_name_is_spelt(spelling, row):
    assert find_gpu(spelling).name == row


@pytest.mark.parametrize("gpu", known_gpus(), ids=lambda gpu: gpu.name)
def test_each_row_finds_itself_and_is_plausible(gpu):
    for spelling in (gpu.name, gpu.name.lower().replace(" ", "-"), gpu.name.upper()):
        assert find_gpu(spelling) is gpu
    assert len(gpu.source) > 10
    if gpu.vendor is not Vendor.OTHER and not gpu.shares_memory:
        assert gpu.why_not_swapped is None
        assert 2 * GIB <= gpu.total_bytes <= gpu.box_gb * GIB <= 288 * GIB
        assert gpu.pcie is None or re.fullmatch(r"PCIe [3-6]\.0 x(4|8|16)", gpu.pcie)
        assert gpu.link_bytes_per_second is None or 3e9 < gpu.link_bytes_per_second < 100e9
        if gpu.published_flops is not None:
            assert 1e12 < gpu.attention_flops < gpu.linear_flops < gpu.published_flops < 3e15 or gpu.model == "GT 1030"
    else:
        assert gpu.why_not_swapped
        assert gpu.compute_ms(1, 1) is None


def test_a_size_in_the_name_of_a_gpu_without_memory_of_its_own_is_the_ram():
    assert find_gpu("Strix Halo").total_bytes is None
    assert find_gpu("Strix Halo 128GB").total_bytes == 128 * GIB
    assert find_gpu("Apple M4 Max 64 GB").total_bytes == 64 * GIB


def test_letters_and_digits_of_full_width_are_read():
    wide = "".join(chr(ord(letter) + 0xFEE0) if letter != " " else letter for letter in "RTX 4060 Ti 16GB")
    assert find_gpu(wide).name == "RTX 4060 Ti 16GB"


def test_names_are_unique():
    names = [gpu.name for gpu in known_gpus()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name",
    [
        "RTX 6000 Laptop",
        "NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU",
        "Quadro RTX 3000",
        "RTX 4090 Max-Q Laptop Super",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10-8Q",
        "RX 7900",
        "RX 6300M",
        "AMD Radeon Graphics",
        "NVIDIA",
        "rtx",
        "titan",
        "",
        "banana",
    ],
)
def test_another_card_or_a_part_of_one_is_not_a_known_one(name):
    with pytest.raises(ValueError, match=rf"^no card is known by the name {re.escape(repr(name))}"):
        find_gpu(name)


def test_a_laptop_gpu_is_a_row_of_its_own_without_lanes_and_hardly_ever_faster():
    for laptop in (gpu for gpu in known_gpus() if gpu.model.endswith("Laptop")):
        desktop = [gpu for gpu in known_gpus() if gpu.model == laptop.model.removesuffix(" Laptop")]
        assert laptop.pcie is laptop.link_bytes_per_second is None
        # A few are a little faster at their highest clock: the RTX 3060 Laptop has more cores than the card.
        assert laptop.published_flops < 1.1 * max(gpu.published_flops for gpu in desktop or [laptop])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RTX 4060 Ti", "RTX 4060 Ti exists with 8 GB and 16 GB; add the size, such as 'RTX 4060 Ti 8GB'"),
        ("3060", "RTX 3060 exists with 8 GB and 12 GB; add the size, such as 'RTX 3060 8GB'"),
        ("RTX 3080 16GB", "RTX 3080 exists with 10 GB and 12 GB, not with 16 GB"),
        ("RTX 3080 16", "RTX 3080 exists with 10 GB and 12 GB, not with 16 GB"),
        ("RTX 4090 D 48GB", "RTX 4090 D exists with 24 GB, not with 48 GB"),
        ("RTX 4090 48GB", "RTX 4090 exists with 24 GB, not with 48 GB"),
        ("H100", "'H100' could be H100 PCIe, H100 SXM or H100 NVL; give the whole name"),
        ("RTX 4065", "no card is known by the name 'RTX 4065'; the nearest are RTX 4060, RTX 5060 and RTX 4090"),
        ("banana", "no card is known by the name 'banana'"),
    ],
)
def test_a_name_that_is_not_one_card_gets_an_answer_that_helps(name, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "gib", "row"),
    [
        ("NVIDIA GeForce RTX 3080", 9.77, "RTX 3080 10GB"),
        ("NVIDIA GeForce RTX 3080", 11.76, "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 7.8, "RTX 3080 Laptop 8GB"),
        ("NVIDIA GeForce RTX 4090", 47.9, "RTX 4090"),
        ("RTX 3080 12GB", 10, "RTX 3080 10GB"),
        ("AMD Radeon RX 9060 XT", 15.92, "RX 9060 XT 16GB"),
        ("AMD Radeon RX 6800/6800 XT / 6900 XT", 15.98, "RX 6800"),
        ("Navi 31 [Radeon RX 7900 XT/7900 XTX/7900 GRE/7900M]", 19.98, "RX 7900 XT"),
        ("AMD Instinct MI250X / MI250", 63.98, "Instinct MI250"),
        ("Quadro RTX 6000/8000", 47.5, "Quadro RTX 8000"),
    ],
)
def test_the_memory_that_the_driver_shows_chooses_the_size(name, gib, row):
    assert find_gpu(name, total_bytes=int(gib * GIB)).name == row


def test_rates_assumed_for_a_card_are_kept_and_others_are_a_share_of_the_published():
    assumed = {
        gpu.name: (gpu.linear_flops / 1e12, gpu.attention_flops / 1e12) for gpu in known_gpus() if gpu.linear_flops
    }
    kept = {"RTX 3060 12GB": (22, 18), "RTX 3090": (60, 50), "RTX 4090": (150, 130), "RTX 5090": (200, 170)}
    kept |= {"RX 7900 XTX": (75, 35), "H200": (600, 450)}
    assert {name: assumed[name] for name in kept} == kept
    gpu = find_gpu("RTX 4070")
    assert gpu.published_flops == pytest.approx(58.3e12, rel=0.01)
    assert gpu.linear_flops == pytest.approx(0.88 * gpu.published_flops)
    assert gpu.compute_ms(0.88 * 58.3e12, 0) == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("RTX 2080 Ti", 53.8),
        ("RTX 3080 10GB", 59.5),
        ("RTX 3090", 71),
        ("RTX 4080", 97.5),
        ("RTX 4090", 165.2),
        ("RTX 5070", 61.7),
        ("RTX 5080", 112.6),
        ("RTX 5090", 209.5),
        ("RTX A6000", 154.8),
        ("RTX 6000 Ada", 364.25),
        ("RTX PRO 6000", 503.8),
    ],
)
def test_computed_rates_are_those_that_the_white_papers_print(name, published):
    assert find_gpu(name).published_flops / 1e12 == pytest.approx(published, rel=0.01)


def test_the_vendor_comes_from_the_table_or_from_amds_words():
    assert {find_gpu(name).vendor for name in ("RX 6400", "MI300X", "W7900", "8060S")} == {Vendor.AMD}
    assert {find_gpu(name).vendor for name in ("4090", "T4", "A100 40GB")} == {Vendor.NVIDIA}
    assert [vendor_of(name) for name in ("Radeon RX 8888", "MI999X", "RTX 4065", "a GPU")] == [
        *(Vendor.AMD, Vendor.AMD, Vendor.NVIDIA, Vendor.NVIDIA)
    ]
