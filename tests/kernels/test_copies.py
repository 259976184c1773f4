"""Copies on streams of their own: in order with what is computed before and after them."""

import pytest
import torch
from alto_kernels.availability import BackendUnavailableError
from alto_kernels.copies import CopyLanes, copy_lanes_available


@pytest.mark.skipif(copy_lanes_available(), reason="the build for CUDA is here")
def test_without_the_cuda_build_it_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match="built without CUDA"):
        CopyLanes(torch.device("cpu"), 2)


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 1000, 1 << 24])
@pytest.mark.gpu
@pytest.mark.skipif(not (copy_lanes_available() and torch.cuda.is_available()), reason="needs CUDA and the build")
def test_copies_come_after_the_last_use_and_before_the_next(lanes: int, length: int) -> None:
    device = torch.device("cuda")
    sources = [torch.full((length,), float(number), device=device) for number in range(3)]
    wholes = [torch.empty(3 * length, device=device) for _ in range(2)]
    copier = CopyLanes(device, lanes)
    targets = [copier.add_target(whole.split(length)) for whole in wholes]
    copies = [(source.data_ptr(), number, number % lanes) for number, source in enumerate(sources)]
    sums, expected = [], []
    for turn in range(20):
        whole, target = wholes[turn % 2], targets[turn % 2]
        # What the last turn left is read late, what this one brings is read at once.
        if turn >= 2:
            torch.cuda._sleep(200_000)
            sums.append(whole.sum(dtype=torch.float64))
            expected.append(3.0 * length + 3.0 * length * (turn - 2))
        for source in sources:
            source.add_(1.0 if turn else 0.0)
        copier.gather(target, copies, length * 4)
        copier.wait(target)
    assert [one.item() for one in sums] == expected
