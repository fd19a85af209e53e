"""What torch alone knows of a device, above all whether it shares the host's memory."""

from __future__ import annotations

import pytest
import torch
from wanvideo_enhanced_blockswap.hardware.device import open_device

CUDA = torch.device("cuda:0")


def is_integrated(install_cuda, name, **changes):
    hip = "6.4" if "AMD" in name else None
    install_cuda(name=name, hip=hip, **({"is_integrated": None} | changes))
    return open_device(CUDA).is_integrated


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GB10",
        "Orin",
        "NVIDIA Jetson AGX Orin",
        "NVIDIA Thor",
        "Xavier",
        "NVIDIA Tegra X2",
        "AMD Radeon 8060S Graphics",
        "AMD Radeon 8050S",
        "AMD Radeon 890M Graphics",
        "AMD Radeon(TM) 780M",
        "AMD Radeon 780M",
        "AMD Radeon Graphics",
        "AMD Radeon(TM) Graphics",
        "AMD Radeon(TM) Vega 8 Graphics",
        "AMD Instinct MI300A",
    ],
)
def test_where_torch_does_not_say_an_integrated_gpu_is_known_by_its_name(install_cuda, name):
    assert is_integrated(install_cuda, name) is True


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "AMD Radeon RX 7900 XTX",
        "AMD Radeon RX 6800M",
        "AMD Radeon RX 6800S",
        "AMD Radeon PRO W7900",
        "AMD Instinct MI300X",
    ],
)
def test_where_torch_does_not_say_every_other_gpu_is_discrete(install_cuda, name):
    assert is_integrated(install_cuda, name) is False


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA GB300"])
def test_a_gpu_with_memory_of_its_own_beside_the_hosts_is_discrete_whatever_torch_says(install_cuda, name):
    assert is_integrated(install_cuda, name, is_integrated=1) is False


@pytest.mark.parametrize(("name", "told"), [("NVIDIA GB10", 0), ("NVIDIA GeForce RTX 4090", 1)])
def test_where_torch_says_its_word_counts(install_cuda, name, told):
    assert is_integrated(install_cuda, name, is_integrated=told) is bool(told)


@pytest.mark.parametrize(
    ("architecture", "expected"), [("gfx1201", False), ("gfx1151", True), ("gfx90a:sramecc+:xnack-", False)]
)
def test_a_radeon_without_a_name_of_its_own_is_known_by_its_instruction_set(install_cuda, architecture, expected):
    # ROCm calls every card "AMD Radeon Graphics" that its own table lacks, as it did the RX 9070 XT.
    assert is_integrated(install_cuda, "AMD Radeon Graphics", gcnArchName=architecture) is expected


def test_an_apu_whose_instruction_set_is_overridden_is_known_by_its_name(install_cuda):
    # HSA_OVERRIDE_GFX_VERSION makes a 780M (gfx1103) run the code of a 7900 XTX.
    assert is_integrated(install_cuda, "AMD Radeon 780M Graphics", gcnArchName="gfx1100") is True
