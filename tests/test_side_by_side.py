import threading
import time

import pytest
import torch

from lrcompress.parallel.side_by_side import AT_ONCE, is_small, side_by_side, workers_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_small_ones_run_together():
    inside, most, lock = set(), [0], threading.Lock()

    def work(size: int) -> tuple[int, int]:
        with lock:
            inside.add(threading.get_ident())
            most[0] = max(most[0], len(inside))
        time.sleep(0.05)
        with lock:
            inside.discard(threading.get_ident())
        return size, torch.get_num_threads()

    sizes = [8, AT_ONCE, 4, 16, AT_ONCE, 2]
    found = side_by_side(work, sizes, lambda size: size, CPU)
    assert [size for size, _ in found] == sizes
    assert most[0] == 3
    assert {threads for size, threads in found if is_small(size)} == {1}
    assert {threads for size, threads in found if not is_small(size)} == {3}
    assert torch.get_num_threads() == 3


def test_no_more_than_fits_at_once():
    assert workers_for([AT_ONCE // 2] * 5, CPU) == 2
    assert workers_for([AT_ONCE // 2 + 1] * 5, CPU) == 1
    assert workers_for([8], CPU) == 1
    assert workers_for([], CPU) == 1
    assert workers_for([8, 8, 8, 8], torch.device("meta")) == 1


def test_an_error_is_raised_and_what_waits_is_left_out():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            raise ArithmeticError("no")
        time.sleep(0.05)
        return item

    with pytest.raises(ArithmeticError, match="no"):
        side_by_side(work, range(50), lambda _: 8, CPU)
    assert len(begun) < 20
    assert torch.get_num_threads() == 3


def test_it_is_without_gradients():
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.no_grad():
        found = side_by_side(lambda _: weight @ weight, [1, 2, 3], lambda _: 8, CPU)
    assert not any(product.requires_grad for product in found)
