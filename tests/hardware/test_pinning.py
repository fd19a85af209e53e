"""Page-locking through torch's binding of the driver, and the count of what is locked."""

from __future__ import annotations

import sys
import threading

import pytest
from wanvideo_enhanced_blockswap.hardware.pinning import PinBudget, register_result


def test_a_budget_counts_what_several_threads_take_and_give_back():
    budget, times = PinBudget(100), 20_000

    def take_and_give_back():
        for _ in range(times):
            budget.take(3)
            budget.give_back(2)

    threads = [threading.Thread(target=take_and_give_back) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert budget.used_bytes == 2 * times
    assert budget.left_bytes == 0


def test_pages_that_are_dropped_while_a_thread_counts_are_given_back_by_it():
    budget = PinBudget(100, used_bytes=10)
    with budget._lock:
        budget.give_back(10)
    assert budget.left_bytes == 100


@pytest.mark.parametrize(("code", "words"), [(2, "out of memory that can be locked"), (999, "a driver error")])
def test_a_return_code_is_shown_with_its_meaning(code, words):
    assert register_result(code) == f"code {code}, {words}"
