"""The pretend accelerator is an accelerator: its own memory, no mixing of devices, and the CPU's results."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pretend_accelerator
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pretend_accelerator import PretendHpu
from torch import Tensor

DEVICE = "hpu:0"

pytestmark = pytest.mark.usefixtures("pretend_device")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_it_is_the_one_hpu_and_says_that_it_is_pretend(pretend_stats: PretendHpu) -> None:
    assert torch.get_device_module("hpu") is pretend_stats is pretend_accelerator.install()
    assert (pretend_stats.measured_by, pretend_stats.is_available()) == ("pretend", True)
    assert (pretend_stats.device_count(), pretend_stats.current_device()) == (1, 0)


def test_tensors_are_memory_of_their_own() -> None:
    host = random(3, 4)
    device = host.to(DEVICE)
    host.zero_()
    assert device.device == torch.device("hpu", 0)
    assert torch.equal(device.cpu(), random(3, 4))


# ---- results


COMPUTATIONS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "linear": lambda on: F.linear(on(random(2, 7, 16)), on(random(8, 16)), on(random(8))),
    "bf16 linear": lambda on: F.linear(on(random(7, 16).bfloat16()), on(random(8, 16).bfloat16())),
    "conv3d": lambda on: F.conv3d(on(random(1, 4, 3, 6, 6)), on(random(8, 4, 1, 2, 2)), on(random(8)), (1, 2, 2)),
    "attention": lambda on: F.scaled_dot_product_attention(
        *(on(random(1, 2, 40 + n, 16))[:, :, :40] for n in range(3))
    ),
    "layer norm": lambda on: F.layer_norm(on(random(5, 64)), (64,), on(random(64)), on(random(64))),
    "bf16 layer norm": lambda on: F.layer_norm(on(random(5, 64).bfloat16()), (64,)),
    "rms norm": lambda on: F.rms_norm(on(random(5, 64)), (64,), on(random(64))),
    "group norm": lambda on: F.group_norm(on(random(2, 8, 5)), 4, on(random(8))),
    "softmax of an expanded tensor": lambda on: on(random(1, 9)).expand(4, 9).softmax(-1),
    "a complex rotation": lambda on: torch.view_as_real(
        torch.view_as_complex(on(random(5, 4, 2).double())) * torch.view_as_complex(on(random(4, 2).double())).conj()
    ),
    "a lazily conjugated copy": lambda on: on(torch.view_as_complex(random(5, 2)).conj()).clone(),
    "float8": lambda on: on(random(6, 5).to(torch.float8_e4m3fn)).to(torch.bfloat16) * 2,
    "int8": lambda on: on(random(6, 5).mul(50).to(torch.int8)).float() / 3,
    "view of another type": lambda on: on(random(3, 4)).view(torch.uint8).flip(-1),
    "as_strided": lambda on: on(random(3, 4)).as_strided((2, 3), (1, 4), 1) + 1,
    "split and cat": lambda on: torch.cat(on(random(6, 4)).split(2)[::-1]),
    "in-place write through a view": lambda on: on(random(4, 4)).t()[1:].fill_(3).add_(1),
    "index by mask": lambda on: (lambda x: x[x > 0])(on(random(6, 6))),
    "embedding": lambda on: F.embedding(on(torch.tensor([2, 0])), on(random(3, 4))),
    "sinusoids": lambda on: torch.outer(on(random(3)), torch.arange(4, device=on(random(1)).device)).cos(),
    "out= that must grow": lambda on: torch.add(on(random(3)), 1, out=torch.empty(0, device=on(random(1)).device)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_operators_give_the_result_of_the_cpu_bit_for_bit(name: str, mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        on_cpu = COMPUTATIONS[name](lambda tensor: tensor)
        on_device = COMPUTATIONS[name](lambda tensor: tensor.to(DEVICE))
    assert on_device.device.type == "hpu"
    assert on_device.stride() == on_cpu.stride()
    assert torch.equal(on_device.cpu(), on_cpu)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wan_transformer_gives_the_output_of_the_cpu_bit_for_bit(
    dtype: torch.dtype, mode: Callable[[], torch.no_grad]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ).to(dtype)  # fmt: skip
    inputs = (random(1, 4, 3, 8, 8, dtype=dtype), torch.tensor([500]), random(1, 7, 16, dtype=dtype))
    with mode():
        expected = model(*inputs, return_dict=False)[0]
        on_device = copy.deepcopy(model).to(DEVICE)
        output = on_device(*(tensor.to(DEVICE) for tensor in inputs), return_dict=False)[0]
    assert output.device.type == "hpu"
    assert torch.equal(output.cpu(), expected)


def test_autocast_computes_products_in_the_lower_type_and_norms_in_fp32() -> None:
    x = random(4, 4).to(DEVICE)
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert F.layer_norm(x, (4,)).dtype == torch.float32


def test_random_numbers_follow_the_seed_of_the_cpu() -> None:
    torch.manual_seed(7)
    on_device = torch.randn(5, device=DEVICE)
    torch.manual_seed(7)
    assert torch.equal(on_device.cpu(), torch.randn(5))


def test_tensors_survive_saving_and_loading() -> None:
    file = io.BytesIO()
    torch.save(random(3, 4).to(DEVICE), file)
    file.seek(0)
    assert torch.equal(torch.load(file).cpu(), random(3, 4))


# ---- storage and views


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_parameter_can_be_pointed_at_the_device_and_back(mode: Callable[[], torch.no_grad]) -> None:
    host = random(3, 4)
    parameter = torch.nn.Parameter(host)
    with mode():
        device = host.to(DEVICE)
        parameter.data = device
        assert (parameter.device, parameter.data_ptr()) == (device.device, device.data_ptr())
        parameter.data = host
    assert (parameter.device.type, parameter.data_ptr()) == ("cpu", host.data_ptr())


def test_views_share_the_memory_of_their_base() -> None:
    slab = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    view = slab[16:48].view(torch.float32).as_strided((2, 3), (4, 1))
    view.copy_(random(2, 3))
    assert view.untyped_storage().data_ptr() == slab.data_ptr()
    assert view.data_ptr() == slab.data_ptr() + 16
    assert torch.equal(slab.cpu()[16:28].view(torch.float32), random(2, 3)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_set_shares_a_storage_of_the_device_and_refuses_one_of_the_host(mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        base = random(3, 4).to(DEVICE)
        whole, part = torch.empty(0, device=DEVICE).set_(base), torch.empty(0, device=DEVICE)
        part.set_(base.untyped_storage(), 5, (2, 3), (4, 1))
        base.add_(1)
        assert torch.equal(whole.cpu(), random(3, 4) + 1)
        assert torch.equal(part.cpu(), (random(3, 4) + 1)[1:, 1:])
        with pytest.raises(RuntimeError, match="set_ expects a storage on hpu:0 but got one on cpu"):
            part.set_(random(2))


def test_resizing_keeps_the_old_bytes_and_poisons_the_new(pretend_stats: PretendHpu) -> None:
    x = random(100).to(DEVICE)
    before = pretend_stats.memory_allocated()
    x.resize_(1000)
    assert torch.equal(x.cpu()[:100], random(100))
    assert pretend_stats.memory_allocated() == before - 512 + 4096
    x.untyped_storage().resize_(0)
    assert pretend_stats.memory_allocated() == before - 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_memory_that_nobody_wrote_reads_as_nan(dtype: torch.dtype) -> None:
    assert torch.empty(1000, dtype=dtype, device=DEVICE).float().isnan().all()


def test_freed_memory_is_poisoned() -> None:
    x = torch.ones(1000, device=DEVICE)
    address = x.data_ptr()
    assert ctypes.string_at(address, 4) == b"\x00\x00\x80\x3f"
    del x
    assert ctypes.string_at(address, 4000) == b"\xff" * 4000


# ---- mixing devices


MIXES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda device, host: device + host,
    "mm": lambda device, host: device @ host,
    "linear": lambda device, host: F.linear(device, host),
    "cat": lambda device, host: torch.cat([device, host]),
    "where": lambda device, host: torch.where(device > 0, device, host),
    "out=": lambda device, host: torch.add(device, 1, out=host),
    "in place on the host": lambda device, host: host.mul_(device),
    "in place on the device": lambda device, host: device.mul_(host),
    "layer_norm": lambda device, host: F.layer_norm(device, (4, 4), host),
    "rms_norm": lambda device, host: F.rms_norm(device, (4, 4), host),
    "conv1d": lambda device, host: F.conv1d(device[:2], device[None, :2, :].repeat(2, 1, 1), host[0, :2]),
    "equal": lambda device, host: torch.equal(device, host),
    "embedding of the host": lambda device, host: F.embedding(torch.tensor([0], device=DEVICE), host),
    "embedding indexed by the host": lambda device, host: F.embedding(host.long(), device),
    "index of the host": lambda device, host: host[torch.tensor([0], device=DEVICE)],
    "index_put of the host": lambda device, host: device.index_put_((torch.tensor([0], device=DEVICE),), host[:1]),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MIXES)
def test_mixing_devices_raises_with_operator_and_shape(name: str, mode: Callable[[], torch.no_grad]) -> None:
    with mode(), pytest.raises(RuntimeError, match=r"same device, but aten::\w+.* got `\w+` of shape \[\d.*\] on cpu"):
        MIXES[name](random(4, 4).to(DEVICE), random(4, 4))


def test_attention_over_two_devices_raises() -> None:
    x = random(1, 2, 8, 16)
    with pytest.raises(RuntimeError, match="same device type"):
        F.scaled_dot_product_attention(x.to(DEVICE), x.to(DEVICE), x)


def test_a_number_in_a_host_tensor_may_be_read_but_not_written() -> None:
    device = random(3).to(DEVICE)
    assert torch.equal((device * torch.tensor(2.0)).cpu(), random(3) * 2)
    with pytest.raises(RuntimeError, match=r"aten::add_.Tensor got `self` of shape \[\] on cpu"):
        torch.tensor(2.0).add_(device.sum())


# ---- building and running it


def test_it_says_why_it_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend_accelerator.is_supported() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no 'no-such-compiler'" in str(pretend_accelerator.is_supported())


def test_a_build_that_fails_raises_and_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("#error broken on purpose\n")
    monkeypatch.setattr(pretend_accelerator, "SOURCES", (broken,))
    monkeypatch.setenv("PRETEND_BUILD_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        pretend_accelerator._load_library()
    assert not list(tmp_path.glob("*.so"))


def test_as_a_script_it_runs_the_command_line_on_the_device(tmp_path: Path) -> None:
    package = tmp_path / "wanvideo_enhanced_blockswap"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import torch\ndef main(argv):\n    print(argv, torch.zeros(1, device='hpu').device)\n    return 3\n"
    )
    script = Path(pretend_accelerator.__file__)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(script), "demo", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (3, "['demo', '--json'] hpu:0\n")
