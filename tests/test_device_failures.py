"""Errors of a driver in our words."""

from __future__ import annotations

import pytest
from wanvideo_enhanced_blockswap.blockswap.device.failures import STAYS, device_error, staged_failure
from wanvideo_enhanced_blockswap.blockswap.errors import BlockSwapError, DeviceMemoryError, TransferError


class DriverError(RuntimeError):
    """As torch.AcceleratorError, which no test can make."""

    def __init__(self, error_code: int) -> None:
        super().__init__(f"CUDA error {error_code}")
        self.error_code = error_code


@pytest.mark.parametrize("code", STAYS)
def test_an_error_that_stays_says_that_only_a_restart_helps(code: int) -> None:
    error = device_error(DriverError(code), "a block was beginning")
    assert isinstance(error, TransferError)
    assert str(error) == (
        "the device failed while a block was beginning, and will until this process ends: "
        f"CUDA error {code}; restart ComfyUI"
    )


def test_an_error_that_may_pass_does_not() -> None:
    assert "until this process ends" not in str(device_error(DriverError(801), "a block was beginning"))


@pytest.mark.parametrize(("code", "expected"), [(2, DeviceMemoryError), (1, TransferError), (700, TransferError)])
def test_a_failure_in_the_staging_worker_is_of_the_kind_it_has_in_the_host_thread(
    code: int, expected: type[BlockSwapError]
) -> None:
    error = staged_failure(DriverError(code))
    assert type(error) is expected
    assert "worker" in str(error)
    assert ("until this process ends" in str(error)) == (code == 700)
