"""Machines as data: what torch, the vendors' libraries, the kernel and the host answer on each, odd answers included.

Totals, units and error kinds are those of public reports; links and what is free are what a person would expect there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fake_vendors import (
    NVMLError_FunctionNotFound,
    NVMLError_LibraryNotFound,
    NVMLError_NoPermission,
    NVMLError_NotSupported,
)
from wanvideo_enhanced_blockswap.hardware import GIB, MIB, LinkSpeed

UNSUPPORTED = NVMLError_NotSupported("Not Supported")
ABSENT = "raise ModuleNotFoundError('no such module')"
"""Text of a module that is not installed."""
NO_LINK = dict.fromkeys(
    (
        "nvmlDeviceGetCurrPcieLinkGeneration",
        "nvmlDeviceGetCurrPcieLinkWidth",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetMaxPcieLinkWidth",
    ),
    UNSUPPORTED,
)


def gib(amount: float) -> int:
    return int(amount * GIB)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as torch shows it, as its driver does, and as sysfs does.

    Attributes:
        free: what mem_get_info says is free, in bytes; an exception is raised.
        units: multiprocessors; of a Radeon half its compute units, which HIP counts in pairs.
        serial: the first part of its UUID.
        domain, bus: of its PCI address.
        tells_identity: this torch gives UUID and PCI address.
        is_integrated: None where this torch does not say.
        architecture: gcnArchName, which only a torch for HIP has.
        link: generation and lanes now, and at most.
        nvml: NVML's answers about this card where they are not the expected ones.
        sysfs: files of its folder.
        vram_usage: amdsmi's answer, where amdsmi is installed.
        reserved: what torch has reserved in this process, in bytes.
    """

    name: str
    total: int
    free: int | Exception
    units: int
    serial: int = 1
    domain: int = 0
    bus: int = 1
    tells_identity: bool = True
    is_integrated: int | None = 0
    architecture: str | None = None
    uuid_prefix: str = "GPU-"
    link: tuple[int, int, int, int] = (1, 16, 4, 16)
    nvml: Mapping[str, Any] = field(default_factory=dict)
    sysfs: Mapping[str, str] = field(default_factory=dict)
    vram_usage: Any = None
    reserved: int = 0

    @property
    def address(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:00.0"

    @property
    def uuid(self) -> str:
        return f"{self.serial:08x}-0000-4000-8000-000000000000"


@dataclass(frozen=True, kw_only=True)
class Host:
    """The host of a GPU.

    Attributes:
        system: sys.platform.
        files: under the root of the file system.
        memlock: RLIMIT_MEMLOCK in bytes; None is no limit.
    """

    ram: int
    available: int
    system: str = "linux"
    release: str = "6.8.0-45-generic"
    files: Mapping[str, str] = field(default_factory=dict)
    memlock: int | None = 8 * MIB


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine.

    Attributes:
        label: what a person would call it.
        cards: in the order of the PCI bus, which is the order in which NVML and amdsmi show them.
        visible: numbers of the cards that torch shows, in its order.
        environment: the variables that make it so.
        hip: the version that torch was built for; None for CUDA.
        driver: version of the kernel driver.
        pynvml, amdsmi: text of a module that is there in place of the real one; None has the real one.
        nvml, smi: answers of the library that are about no one card.
        link: what a measurement of the link finds.
        device: what is asked about.
        warnings: how many the readings give.
    """

    label: str
    host: Host
    cards: tuple[Card, ...] = ()
    visible: tuple[int, ...] = (0,)
    environment: Mapping[str, str] = field(default_factory=dict)
    hip: str | None = None
    driver: str = "580.95.05"
    pynvml: str | None = None
    amdsmi: str | None = ABSENT
    nvml: Mapping[str, Any] = field(default_factory=dict)
    smi: Mapping[str, Any] = field(default_factory=dict)
    link: LinkSpeed | None = None
    device: str = "cuda:0"
    warnings: int = 0


def speeds(pinned: float, pageable: float, copy: float, *, one: float | None = None) -> LinkSpeed:
    """A link in GB/s: one stream reaches nearly all of `pinned`, or `one`."""
    counts = {1: one or 0.99 * pinned, 2: pinned, 4: pinned, 8: pinned, 12: pinned, 16: 0.99 * pinned}
    return LinkSpeed(tuple((count, speed * 1e9) for count, speed in counts.items()), pageable * 1e9, copy * 1e9)


PCIE3_X16 = speeds(12.4, 5.8, 7.0)
PCIE4_X8 = speeds(13.1, 6.5, 10.0)
PCIE4_X16 = speeds(25.6, 8.0, 11.0)
PCIE4_X16_WINDOWS = speeds(24.4, 6.0, 9.5)
PCIE5_X16 = speeds(55.0, 11.0, 13.0, one=52.0)  # two streams fill the gaps between copies
PCIE5_X16_WINDOWS = speeds(50.0, 8.5, 11.5, one=46.0)
SERVER = speeds(55.0, 12.0, 9.0)  # slower cores
C2C = speeds(375.0, 60.0, 30.0)  # NVLink from Grace to Hopper
RADEON_LINUX = speeds(26.5, 12.5, 11.0)
# Pinned memory stalls there; the measurement of a few copies does not show it.
RADEON_WINDOWS = speeds(22.0, 7.0, 9.5)
RADEON_PINNED_NO_FASTER = speeds(12.0, 12.4, 11.0)


def linux(ram: float, available: float, **changes: Any) -> Host:
    return Host(ram=gib(ram), available=gib(available), **changes)


def windows(ram: float, available: float) -> Host:
    return Host(ram=gib(ram), available=gib(available), system="win32", memlock=None)


def wsl2(ram: float, available: float) -> Host:
    """Its RAM is half of the machine's by default."""
    return linux(ram, available, release="5.15.153.1-microsoft-standard-WSL2", memlock=64 * MIB)


def container_v2(limit: float, used: float, cache: float) -> Mapping[str, str]:
    return {
        ".dockerenv": "",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{gib(limit)}\n",
        "sys/fs/cgroup/memory.current": f"{gib(used)}\n",
        "sys/fs/cgroup/memory.stat": f"anon {gib(used - cache)}\nfile {gib(cache)}\ninactive_file {gib(cache)}\n",
    }


def container_v1(limit: float, used: float, cache: float) -> Mapping[str, str]:
    """It sees the host's path of its group, which is mounted at the root of the hierarchy."""
    return {
        ".dockerenv": "",
        "proc/self/cgroup": "12:cpu,cpuacct:/docker/4f1c\n5:memory:/docker/4f1c\n0::/system.slice/containerd.service\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{gib(limit)}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{gib(used)}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache {gib(cache)}\ntotal_inactive_file {gib(cache)}\n",
    }


def radeon_files(total: float, used: float, *, gtt: float | None = None, speed: str = "16.0 GT/s PCIe") -> Any:
    """What sysfs has of an AMD card."""
    files = {
        "mem_info_vram_total": f"{gib(total)}\n",
        "mem_info_vram_used": f"{gib(used)}\n",
        "gpu_busy_percent": "0\n",
        "current_link_speed": "2.5 GT/s PCIe\n",
        "current_link_width": "16\n",
        "max_link_speed": f"{speed}\n",
        "max_link_width": "16\n",
    }
    return files if gtt is None else files | {"mem_info_gtt_total": f"{gib(gtt)}\n"}


def rtx_3060(free: float = 11.24, **changes: Any) -> Card:
    return Card(name="NVIDIA GeForce RTX 3060", **{"total": gib(11.76), "free": gib(free), "units": 28} | changes)


def rtx_3080(free: float = 9.35, **changes: Any) -> Card:
    return Card(name="NVIDIA GeForce RTX 3080", **{"total": gib(9.77), "free": gib(free), "units": 68} | changes)


def rtx_3090(free: float = 23.3, **changes: Any) -> Card:
    return Card(name="NVIDIA GeForce RTX 3090", **{"total": gib(23.69), "free": gib(free), "units": 82} | changes)


def rtx_4090(free: float = 23.15, **changes: Any) -> Card:
    return Card(name="NVIDIA GeForce RTX 4090", **{"total": gib(23.52), "free": gib(free), "units": 128} | changes)


def h100(**changes: Any) -> Card:
    common = {"total": gib(79.18), "free": gib(78.6), "units": 132, "link": (5, 16, 5, 16)}
    return Card(**{"name": "NVIDIA H100 80GB HBM3"} | common | changes)


def holder(name: str, total: float) -> Card:
    """A GPU in MIG mode: NVML lists it, but refuses most queries."""
    forbidden = dict.fromkeys(
        ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates"), NVMLError_NoPermission("Insufficient Permissions")
    )
    return Card(name=name, total=gib(total), free=0, units=132, serial=9, nvml=forbidden)


def instance(name: str, total: float, free: float, units: int) -> Card:
    """A MIG instance: it has its own UUID, and the address of its GPU."""
    return Card(
        name=name,
        total=gib(total),
        free=gib(free),
        units=units,
        serial=2,
        uuid_prefix="MIG-",
        nvml=NO_LINK | {"nvmlDeviceGetUtilizationRates": UNSUPPORTED},
    )


def rx_6800(**changes: Any) -> Card:
    common = {"total": gib(15.98), "free": gib(15.7), "units": 30, "bus": 3, "architecture": "gfx1030"}
    return Card(**{"name": "AMD Radeon RX 6800", "sysfs": radeon_files(15.98, 0.3)} | common | changes)


def rx_7900_xt(**changes: Any) -> Card:
    common = {"total": gib(19.98), "free": gib(19.6), "units": 42, "bus": 3, "architecture": "gfx1100"}
    return Card(**{"name": "AMD Radeon RX 7900 XT", "sysfs": radeon_files(19.98, 0.4)} | common | changes)


def rx_7900_xtx(**changes: Any) -> Card:
    common = {"total": gib(23.98), "free": gib(23.5), "units": 48, "bus": 3, "architecture": "gfx1100"}
    return Card(**{"name": "AMD Radeon RX 7900 XTX", "sysfs": radeon_files(23.98, 0.5)} | common | changes)


def rx_9070_xt(**changes: Any) -> Card:
    files = radeon_files(15.92, 0.4, speed="32.0 GT/s PCIe")
    common = {"total": gib(15.92), "free": gib(15.4), "units": 32, "bus": 3, "architecture": "gfx1201"}
    return Card(**{"name": "AMD Radeon RX 9070 XT", "sysfs": files} | common | changes)


def strix_halo(**changes: Any) -> Card:
    common = {"units": 20, "bus": 0xC4, "is_integrated": 1, "architecture": "gfx1151"}
    return Card(**{"name": "AMD Radeon 8060S Graphics"} | common | changes)


NVIDIA = (
    Machine(label="RTX 3060 12GB, Linux", host=linux(31.2, 26), cards=(rtx_3060(),), link=PCIE4_X16),
    Machine(
        label="RTX 3060 12GB, Windows",
        host=windows(31.9, 22),
        cards=(rtx_3060(10.9, total=gib(12.0)),),
        link=PCIE4_X16_WINDOWS,
    ),
    Machine(
        label="RTX 3060 12GB, Windows, 48 GB of RAM",
        host=windows(47.9, 37),
        cards=(rtx_3060(10.9, total=gib(12.0)),),
        link=PCIE4_X16_WINDOWS,
    ),
    Machine(label="RTX 3090, Linux", host=linux(62.7, 55), cards=(rtx_3090(),), link=PCIE4_X16),
    Machine(
        label="RTX 3090, Windows",
        host=windows(63.9, 50),
        cards=(rtx_3090(22.7, total=gib(24.0)),),
        link=PCIE4_X16_WINDOWS,
    ),
    Machine(label="RTX 4090, Linux", host=linux(62.7, 55), cards=(rtx_4090(),), link=PCIE4_X16),
    Machine(
        label="RTX 4090, Windows",
        host=windows(63.7, 49),
        cards=(rtx_4090(22.5, total=gib(23.99)),),
        link=PCIE4_X16_WINDOWS,
    ),
    Machine(
        label="RTX 5090, Linux",
        host=linux(125.6, 115),
        cards=(
            Card(
                name="NVIDIA GeForce RTX 5090",
                total=gib(31.37),
                free=gib(30.8),
                units=170,
                link=(1, 16, 5, 16),
            ),
        ),
        link=PCIE5_X16,
    ),
    Machine(
        label="RTX 5090, Windows",
        host=windows(95.8, 78),
        cards=(
            Card(
                name="NVIDIA GeForce RTX 5090",
                total=gib(31.84),
                free=gib(30.1),
                units=170,
                link=(1, 16, 5, 16),
            ),
        ),
        link=PCIE5_X16_WINDOWS,
    ),
    Machine(
        label="RTX 4060 laptop 8GB, Windows, 16 GB of RAM",
        host=windows(15.7, 9.5),
        cards=(
            Card(
                name="NVIDIA GeForce RTX 4060 Laptop GPU",
                total=gib(8.0),
                free=gib(6.9),
                units=24,
                link=(1, 8, 4, 8),
            ),
        ),
        link=PCIE4_X8,
    ),
    Machine(
        label="RTX 4060 laptop 8GB, Linux, 32 GB of RAM",
        host=linux(31.0, 25),
        cards=(
            Card(
                name="NVIDIA GeForce RTX 4060 Laptop GPU",
                total=gib(7.63),
                free=gib(7.4),  # the desktop runs on the CPU's own graphics
                units=24,
                link=(1, 8, 4, 8),
            ),
        ),
        link=PCIE4_X8,
    ),
    Machine(label="RTX 3080 10GB, Linux", host=linux(31.2, 26), cards=(rtx_3080(),), link=PCIE4_X16),
    Machine(
        label="RTX 4070 Ti SUPER 16GB, Windows",
        host=windows(31.8, 22),
        cards=(Card(name="NVIDIA GeForce RTX 4070 Ti SUPER", total=gib(15.99), free=gib(14.7), units=66),),
        link=PCIE4_X16_WINDOWS,
    ),
    Machine(
        label="RTX 4070 Ti SUPER 16GB, Linux",
        host=linux(62.7, 55),
        cards=(Card(name="NVIDIA GeForce RTX 4070 Ti SUPER", total=gib(15.7), free=gib(15.3), units=66),),
        link=PCIE4_X16,
    ),
    Machine(
        label="GTX 1660 6GB, Linux",
        host=linux(31.2, 27),
        cards=(
            Card(
                name="NVIDIA GeForce GTX 1660",
                total=gib(5.8),
                free=gib(5.4),
                units=22,
                link=(1, 16, 3, 16),
            ),
        ),
        link=PCIE3_X16,
    ),
    Machine(
        label="RTX A6000 48GB, Linux",
        host=linux(125.6, 118),
        cards=(Card(name="NVIDIA RTX A6000", total=gib(47.54), free=gib(47.1), units=84),),
        link=PCIE4_X16,
    ),
    Machine(
        label="RTX PRO 6000 96GB with 32 GB of RAM, Linux",  # less RAM than the card has, and than the models need
        host=linux(31.2, 27),
        cards=(
            Card(
                name="NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
                total=gib(94.97),
                free=gib(94.3),
                units=188,
                link=(1, 16, 5, 16),
            ),
        ),
        link=PCIE5_X16,
    ),
    Machine(label="H100 80GB", host=linux(2015, 1900, memlock=None), cards=(h100(),), link=SERVER),
    Machine(
        label="H100 80GB, MIG 1g.10gb",
        host=linux(2015, 1900),
        cards=(
            holder("NVIDIA H100 80GB HBM3", 79.18),
            instance("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5, 9.4, 16),
        ),
        visible=(1,),
        environment={"CUDA_VISIBLE_DEVICES": "MIG-00000002-0000-4000-8000-000000000000"},
        link=speeds(13.0, 8.0, 9.0),  # an instance has a share of the copy engines
        warnings=1,
    ),
    Machine(
        label="H100 80GB, MIG 3g.40gb",
        host=linux(2015, 1900),
        cards=(
            holder("NVIDIA H100 80GB HBM3", 79.18),
            instance("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.5, 39.3, 60),
        ),
        visible=(1,),
        environment={"CUDA_VISIBLE_DEVICES": "MIG-00000002-0000-4000-8000-000000000000"},
        link=speeds(26.0, 10.0, 9.0),
        warnings=1,
    ),
    Machine(
        label="H200 141GB",
        host=linux(2015, 1900, memlock=None),
        cards=(h100(name="NVIDIA H200", total=gib(139.8), free=gib(139.2)),),
        link=SERVER,
    ),
    Machine(
        label="H200, MIG 1g.18gb",
        host=linux(2015, 1900),
        cards=(holder("NVIDIA H200", 139.8), instance("NVIDIA H200 MIG 1g.18gb", 16.0, 15.9, 16)),
        visible=(1,),
        environment={"CUDA_VISIBLE_DEVICES": "MIG-00000002-0000-4000-8000-000000000000"},
        link=speeds(13.0, 8.0, 9.0),
        warnings=1,
    ),
    Machine(
        label="GH200 480GB",  # coherent, but its HBM is its own
        host=linux(470, 450),
        cards=(
            Card(
                name="NVIDIA GH200 480GB",
                total=gib(94.5),
                free=gib(94.0),
                units=132,
                domain=9,
                nvml=NO_LINK,
            ),
        ),
        link=C2C,
        warnings=1,
    ),
)

ONE_MEMORY = (
    Machine(
        label="DGX Spark (GB10)",  # mem_get_info gives MemFree: a checkpoint was just read into the page cache
        host=linux(121.7, 115.6),
        cards=(
            Card(
                name="NVIDIA GB10",
                total=gib(121.69),
                free=gib(41.5),
                units=48,
                domain=0xF,
                is_integrated=1,
                nvml=NO_LINK | {"nvmlDeviceGetMemoryInfo": UNSUPPORTED},
            ),
        ),
        warnings=1,
    ),
    Machine(
        label="DGX Spark (GB10) in a container of 48 GB",
        host=linux(121.7, 115.6, files=container_v2(48, 12, 10)),
        cards=(
            Card(
                name="NVIDIA GB10",
                total=gib(121.69),
                free=gib(103),
                units=48,
                domain=0xF,
                is_integrated=1,
                nvml=NO_LINK | {"nvmlDeviceGetMemoryInfo": UNSUPPORTED},
            ),
        ),
        warnings=1,
    ),
    Machine(
        label="Jetson AGX Orin 64GB, torch without is_integrated",
        host=linux(61.37, 55),
        cards=(
            Card(
                name="Orin",
                total=gib(61.37),
                free=gib(30),
                units=16,
                tells_identity=False,
                is_integrated=None,
                nvml=NO_LINK | {"nvmlDeviceGetMemoryInfo": UNSUPPORTED},
            ),
        ),
        driver="540.4.0",
        warnings=1,
    ),
    Machine(
        label="Jetson Orin Nano 8GB",
        host=linux(7.44, 5.2),
        cards=(Card(name="Orin", total=gib(7.44), free=gib(2), units=8, is_integrated=1, nvml=NO_LINK),),
        nvml={"nvmlInit": NVMLError_LibraryNotFound("NVML Shared Library Not Found")},  # before JetPack 6
        warnings=1,
    ),
    Machine(
        label="Jetson Thor 128GB",
        host=linux(122.82, 112),
        cards=(
            Card(
                name="NVIDIA Thor",
                total=gib(122.82),
                free=gib(80),
                units=20,
                is_integrated=1,
                nvml=NO_LINK | {"nvmlDeviceGetMemoryInfo": UNSUPPORTED},
            ),
        ),
        warnings=1,
    ),
    Machine(
        label="Strix Halo 128GB, Linux, 0.5 GB set aside",  # 120 GB free of 62.5: so HIP says with amdgpu.gttsize
        host=linux(124.92, 117),
        hip="7.13",
        cards=(
            strix_halo(
                total=gib(62.47),
                free=gib(120),
                sysfs=radeon_files(0.5, 0.3, gtt=128.0),
            ),
        ),
    ),
    Machine(
        label="Strix Halo 128GB, Linux, 96 GB set aside",  # only sysfs shows what other programs use
        host=linux(30.9, 26),
        hip="7.13",
        cards=(strix_halo(total=gib(96), free=gib(95.2), sysfs=radeon_files(96, 0.8, gtt=15.4)),),
    ),
    Machine(
        label="Strix Halo 128GB, Windows, 64 GB set aside",  # HIP adds part of the host's memory to what is set aside
        host=windows(63.65, 52),
        hip="7.13",
        cards=(strix_halo(total=gib(99.74), free=gib(99.5)),),
        warnings=1,
    ),
    Machine(
        label="Radeon 890M laptop, 32 GB, Linux, torch without is_integrated",
        host=linux(30.5, 24),
        hip="6.4",
        cards=(
            Card(
                name="AMD Radeon 890M Graphics",
                total=gib(15.25),
                free=gib(15.1),
                units=8,
                bus=0xC1,
                is_integrated=None,
                architecture="gfx1150",
                sysfs=radeon_files(0.5, 0.4, gtt=15.25),
            ),
        ),
    ),
)

AMD = (
    Machine(
        label="RX 6800 16GB, Linux, no amdsmi", host=linux(31.2, 26), hip="6.4", cards=(rx_6800(),), link=RADEON_LINUX
    ),
    Machine(
        label="RX 6800 16GB, Windows",
        host=windows(31.9, 22),
        hip="7.13",  # the first release of wheels for Windows with this chip
        cards=(rx_6800(total=16368 * MIB, free=16218 * MIB),),
        link=RADEON_WINDOWS,
        warnings=1,
    ),
    Machine(
        label="RX 7900 XT 20GB, Linux, amdsmi",
        host=linux(62.7, 55),
        hip="6.4",
        cards=(rx_7900_xt(vram_usage={"vram_total": 20464, "vram_used": 380}),),
        amdsmi=None,
        link=RADEON_LINUX,
    ),
    Machine(
        label="RX 7900 XT 20GB, Windows",
        host=windows(63.9, 50),
        hip="6.4",
        cards=(rx_7900_xt(total=20464 * MIB, free=20314 * MIB),),
        link=RADEON_WINDOWS,
        warnings=1,
    ),
    Machine(
        label="RX 7900 XTX 24GB, Linux, amdsmi raises KeyError at import",
        host=linux(62.7, 55),
        hip="6.4",
        cards=(rx_7900_xtx(),),
        amdsmi="raise KeyError('libamd_smi.so')",
        link=RADEON_LINUX,
    ),
    Machine(
        label="RX 7900 XTX 24GB, Linux, pinned copies no faster than pageable",  # virtual machine, no large BAR
        host=linux(62.7, 55),
        hip="6.4",
        cards=(rx_7900_xtx(),),
        link=RADEON_PINNED_NO_FASTER,
    ),
    Machine(
        label="RX 7900 XTX 24GB, Linux container that HIP refuses to tell free memory",
        host=linux(62.7, 55, files=container_v2(48, 6, 4)),
        hip="6.4",
        cards=(rx_7900_xtx(free=RuntimeError("HIP error: invalid argument")),),
        link=RADEON_LINUX,
        warnings=1,
    ),
    Machine(
        label="RX 7900 XTX 24GB, Windows",  # the card was nearly full at this reading of HIP
        host=windows(63.9, 50),
        hip="6.4",
        cards=(rx_7900_xtx(total=24560 * MIB, free=24410 * MIB),),
        link=RADEON_WINDOWS,
        warnings=1,
    ),
    Machine(
        label="RX 9070 XT 16GB, Linux, amdsmi shows no devices",
        host=linux(31.2, 26),
        hip="7.0",
        cards=(rx_9070_xt(),),
        amdsmi=None,
        smi={"amdsmi_get_processor_handles": []},
        link=RADEON_LINUX,
    ),
    Machine(
        label="RX 9070 XT 16GB, Linux, that ROCm has no name for yet",
        host=linux(31.2, 26),
        hip="6.3",
        cards=(rx_9070_xt(name="AMD Radeon Graphics", is_integrated=None),),
        amdsmi="raise AttributeError('undefined symbol: amdsmi_get_gpu_xcd_counter')",
        link=RADEON_LINUX,
    ),
    Machine(
        label="RX 9070 XT 16GB, Windows, 32 GB of RAM",
        host=windows(31.8, 21),
        hip="7.0",
        cards=(rx_9070_xt(free=gib(15.77)),),
        link=RADEON_WINDOWS,
        warnings=1,
    ),
    Machine(
        label="RX 7900 XTX 24GB, WSL2",  # the library between HIP and the driver counts the other processes here
        host=wsl2(31.3, 28),
        hip="7.2",
        cards=(rx_7900_xtx(total=24517 * MIB, free=21615 * MIB, sysfs={}),),
        link=speeds(21.0, 6.0, 9.0),
        warnings=1,
    ),
    Machine(
        label="MI300X 192GB",
        host=linux(2267, 2100, memlock=None),
        hip="6.4",
        cards=(
            Card(
                name="AMD Instinct MI300X",
                total=gib(191.98),
                free=gib(191.4),
                units=304,
                bus=5,
                architecture="gfx942:sramecc+:xnack-",
                sysfs=radeon_files(191.98, 0.3, speed="32.0 GT/s PCIe"),
                vram_usage={"vram_total": 196592, "vram_used": 298},
            ),
        ),
        amdsmi=None,
        link=SERVER,
    ),
    Machine(
        label="RX 6800 16GB behind ZLUDA, Windows",  # a torch for CUDA, without a runtime of AMD's to ask
        host=windows(31.9, 23),
        cards=(rx_6800(name="AMD Radeon RX 6800 [ZLUDA]", free=gib(15.8), architecture=None),),
        pynvml=ABSENT,
        link=RADEON_WINDOWS,
        warnings=1,
    ),
)

TWO_CARDS = (
    Machine(
        label="RTX 3090 and 3060, CUDA_VISIBLE_DEVICES=1,0",  # cuda:0 is the second card of NVML
        host=linux(62.7, 55),
        cards=(rtx_3090(serial=1, bus=1), rtx_3060(serial=2, bus=0x21, link=(1, 4, 3, 16))),
        visible=(1, 0),
        environment={"CUDA_VISIBLE_DEVICES": "1,0"},
        link=speeds(3.2, 2.9, 11.0),  # a slot of four lanes
    ),
    Machine(
        label="RTX 3090 and 3060, the same, cuda:1",
        host=linux(62.7, 55),
        cards=(rtx_3090(serial=1, bus=1), rtx_3060(serial=2, bus=0x21, link=(1, 4, 3, 16))),
        visible=(1, 0),
        environment={"CUDA_VISIBLE_DEVICES": "GPU-00000002,GPU-00000001"},
        link=PCIE4_X16,
        device="cuda:1",
    ),
    Machine(
        label="RX 6800 and 7900 XTX, ROCR_VISIBLE_DEVICES=1,0 HIP_VISIBLE_DEVICES=0",
        host=linux(62.7, 55),
        hip="6.4",
        cards=(
            rx_6800(bus=3, vram_usage={"vram_total": 16368, "vram_used": 16000}),
            rx_7900_xtx(bus=0x43, serial=2, vram_usage={"vram_total": 24560, "vram_used": 500}),
        ),
        visible=(1,),
        environment={"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"},
        amdsmi=None,
        link=RADEON_LINUX,
    ),
    Machine(
        label="RX 6800 and 7900 XTX, HIP_VISIBLE_DEVICES=1,0, free memory told wrong",  # amdsmi reads the right card
        host=linux(62.7, 55),
        hip="6.4",
        cards=(
            rx_6800(bus=3, vram_usage={"vram_total": 16368, "vram_used": 16000}),
            rx_7900_xtx(bus=0x43, serial=2, free=gib(31), vram_usage={"vram_total": 24560, "vram_used": 4080}),
        ),
        visible=(1, 0),
        environment={"HIP_VISIBLE_DEVICES": "1,0"},
        amdsmi=None,
        link=RADEON_LINUX,
        warnings=1,
    ),
    Machine(
        label="two RTX 3080, torch without UUID and PCI address",  # nothing shows which of the two it is
        host=linux(62.7, 55),
        cards=(rtx_3080(tells_identity=False), rtx_3080(serial=2, tells_identity=False)),
        visible=(0, 1),
        link=PCIE4_X16,
        warnings=1,
    ),
)

ODD = (
    Machine(
        label="RTX 4090, WSL2, NVML in part",
        host=wsl2(31.3, 28.5),
        cards=(rtx_4090(21.9, total=gib(23.99), nvml=NO_LINK | {"nvmlDeviceGetUtilizationRates": UNSUPPORTED}),),
        driver="581.57",
        link=speeds(22.5, 6.0, 9.5),
        warnings=1,
    ),
    Machine(
        label="RTX 4090 in a container of 16 GB on a host of 64, cgroup v2",
        host=linux(62.7, 55, files=container_v2(16, 9, 6)),
        cards=(rtx_4090(),),
        link=PCIE4_X16,
    ),
    Machine(
        label="RTX 4090 in a container of 16 GB on a host of 64, cgroup v1",
        host=linux(62.7, 55, files=container_v1(16, 9, 6)),
        cards=(rtx_4090(),),
        link=PCIE4_X16,
    ),
    Machine(
        label="RTX 3060 12GB, RLIMIT_MEMLOCK of 64 KB",  # drivers ignore it
        host=linux(62.7, 55, memlock=64 * 1024),
        cards=(rtx_3060(),),
        link=PCIE4_X16,
    ),
    Machine(
        label="RTX 4090, half taken by another process",
        host=linux(62.7, 48),
        cards=(rtx_4090(11.3),),
        link=PCIE4_X16,
    ),
    Machine(label="RTX 4090, full", host=linux(62.7, 48), cards=(rtx_4090(0.06),), link=PCIE4_X16),
    Machine(
        label="RTX 4090, driver refuses to page-lock",
        host=linux(62.7, 55),
        cards=(rtx_4090(),),
        link=LinkSpeed((), 8e9),
    ),
    Machine(
        label="RTX 3090, torch tells more free than there is, and NVML is not installed",
        host=linux(62.7, 55),
        cards=(rtx_3090(40, reserved=gib(1)),),
        pynvml=ABSENT,
        link=PCIE4_X16,
        warnings=3,
    ),
    Machine(
        label="RTX 3090, NVML without a driver",
        host=linux(62.7, 55),
        cards=(rtx_3090(),),
        nvml={"nvmlInit": NVMLError_LibraryNotFound("NVML Shared Library Not Found")},
        link=PCIE4_X16,
        warnings=1,
    ),
    Machine(
        label="RTX 3090, pynvml exits at import",
        host=linux(62.7, 55),
        cards=(rtx_3090(),),
        pynvml="raise SystemExit(1)",
        link=PCIE4_X16,
        warnings=1,
    ),
    Machine(
        label="RTX 3090, another package called pynvml",
        host=linux(62.7, 55),
        cards=(rtx_3090(),),
        pynvml="__version__ = '0.1'",
        link=PCIE4_X16,
        warnings=1,
    ),
    Machine(
        label="RTX 3080 10GB, driver of 2021, old binding",
        host=linux(31.2, 26),
        cards=(
            rtx_3080(
                nvml={
                    "nvmlDeviceGetName": b"NVIDIA GeForce RTX 3080",
                    "nvmlDeviceGetMemoryInfo": NVMLError_FunctionNotFound("Function Not Found"),
                    "nvmlDeviceGetMaxPcieLinkGeneration": NVMLError_FunctionNotFound("Function Not Found"),
                },
            ),
        ),
        driver="470.42.01",
        nvml={"nvmlSystemGetDriverVersion": b"470.42.01"},
        link=PCIE4_X16,
        warnings=1,
    ),
    Machine(
        label="RTX 3080 10GB and 3060, torch without UUID and PCI address",  # one alone bears the name
        host=linux(62.7, 55),
        cards=(rtx_3060(serial=2, tells_identity=False), rtx_3080(tells_identity=False)),
        visible=(1, 0),
        environment={"CUDA_VISIBLE_DEVICES": "1,0"},
        link=PCIE4_X16,
    ),
    Machine(label="no GPU", host=linux(31.2, 27), device="cpu"),
)

MACHINES: tuple[Machine, ...] = NVIDIA + ONE_MEMORY + AMD + TWO_CARDS + ODD
