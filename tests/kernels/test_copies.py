"""Copies on a stream of their own: in order with what is computed before and after them, and in turn with others'."""

import time

import pytest
import torch
from alto_kernels.availability import BackendUnavailableError
from alto_kernels.copies import CopyLane, copy_lane_available

needs_cuda = pytest.mark.skipif(
    not (copy_lane_available() and torch.cuda.is_available()), reason="needs CUDA and the build"
)


@pytest.mark.skipif(copy_lane_available(), reason="the build for CUDA is here")
def test_without_the_cuda_build_it_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match="built without CUDA"):
        CopyLane(torch.device("cpu"))


@pytest.mark.parametrize("length", [1, 1000, 1 << 24])
@pytest.mark.gpu
@needs_cuda
def test_copies_come_after_the_last_use_and_before_the_next(length: int) -> None:
    device = torch.device("cuda")
    sources = [torch.full((length,), float(number), device=device) for number in range(3)]
    wholes = [torch.empty(3 * length, device=device) for _ in range(2)]
    copier = CopyLane(device)
    targets = [copier.add_target([part.data_ptr() for part in whole.split(length)]) for whole in wholes]
    copies = [(source.data_ptr(), number, 0) for number, source in enumerate(sources)]
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


@pytest.mark.gpu
@needs_cuda
def test_a_copy_waits_until_nobody_reads_from_there() -> None:
    device = torch.device("cuda")
    source = torch.arange(1000.0, device=device)
    # In the host's memory, so that it is read and written beside a GPU that waits: streams may share what waits.
    whole, busy = torch.zeros(1000).pin_memory(), torch.ones(1, dtype=torch.int32).pin_memory()
    copier = CopyLane(device)
    target = copier.add_target([whole.data_ptr()])
    torch.cuda.synchronize()
    copier.gather(target, [(source.data_ptr(), 0, busy.data_ptr())], 4000)
    time.sleep(0.2)
    waited = whole.sum().item() == 0.0
    busy.zero_()  # whoever read has ended
    torch.cuda.synchronize()
    assert waited
    assert torch.equal(whole, source.cpu())
    assert busy.item() == 0


@pytest.mark.gpu
@needs_cuda
def test_readers_of_one_place_all_come_to_their_turns() -> None:
    device = torch.device("cuda")
    sources = [torch.full((1 << 22,), float(number), device=device) for number in range(3)]
    busy = torch.zeros(3, dtype=torch.int32, device=device)
    readers = [CopyLane(device) for _ in range(4)]
    wholes = [torch.empty(3, 1 << 22, device=device) for _ in readers]
    targets = [
        reader.add_target([part.data_ptr() for part in whole]) for reader, whole in zip(readers, wholes, strict=True)
    ]
    order = [(source.data_ptr(), number, busy[number:].data_ptr()) for number, source in enumerate(sources)]
    for _ in range(50):
        for first, (reader, target) in enumerate(zip(readers, targets, strict=True)):
            reader.gather(target, order[first % 3 :] + order[: first % 3], sources[0].nbytes)
            reader.wait(target)
    for whole in wholes:
        assert all(torch.equal(part, source) for part, source in zip(whole, sources, strict=True))
    assert busy.tolist() == [0, 0, 0]
