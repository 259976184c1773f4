"""Memory under several addresses, and in several processes."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from alto_kernels.copies import copy_lane_available
from alto_kernels.mapped_memory import granularity, make_memory, mapped, memory_can_be_given, memory_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (copy_lane_available() and torch.cuda.is_available()), reason="needs CUDA and the build"),
]

OTHER_PROCESS = """
import socket, sys, torch
from alto_kernels.mapped_memory import mapped, memory_of
device = torch.device("cuda", 0)
torch.cuda.set_device(device)
_, (descriptor,), _, _ = socket.recv_fds(socket.socket(fileno=int(sys.argv[1])), 1, 1)
tensor = mapped(device, [memory_of(device, descriptor, int(sys.argv[2]))], torch.int32)
tensor.mul_(2)
torch.cuda.synchronize()
"""


def test_the_same_memory_lies_under_several_tensors() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    size = granularity(device)
    own, one, other = (make_memory(device, count * size) for count in (1, 1, 1))
    first, second = mapped(device, [one, own], torch.float32), mapped(device, [own, other], torch.float32)
    elements = size // 4
    assert first.device == device
    assert first.shape == (2 * elements,)
    first.copy_(torch.arange(2.0 * elements))
    second[elements:].fill_(-1.0)
    assert torch.equal(second[:elements].cpu(), torch.arange(elements, 2 * elements).float())
    assert torch.equal(first[:elements].cpu(), torch.arange(elements).float())
    del first, own
    assert second.sum(dtype=torch.float64).item() == sum(range(elements, 2 * elements)) - elements


def test_memory_comes_back_when_no_tensor_has_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    size = 64 * granularity(device)
    torch.empty(1, device=device)
    before = torch.cuda.mem_get_info(device)[0]
    for _ in range(3):
        tensor = mapped(device, [make_memory(device, size)], torch.uint8)
        assert torch.cuda.mem_get_info(device)[0] <= before - size
        del tensor
    assert torch.cuda.mem_get_info(device)[0] == before


def test_that_memory_can_be_given_is_found_out_without_a_trace() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1, device=device)
    before = torch.cuda.mem_get_info(device)[0]
    descriptors = len(os.listdir("/proc/self/fd"))
    assert memory_can_be_given(device)
    assert torch.cuda.mem_get_info(device)[0] == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_sizes_that_do_not_fit_are_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with pytest.raises(ValueError, match="multiple of memory_granularity"):
        make_memory(device, granularity(device) + 1)
    with pytest.raises(MemoryError):
        make_memory(device, 2**20 * granularity(device))


def test_another_process_writes_to_it() -> None:
    device = torch.device("cuda", 0)
    size = granularity(device)
    memory = make_memory(device, size)
    tensor = mapped(device, [memory], torch.int32)
    tensor.copy_(torch.arange(size // 4))
    torch.cuda.synchronize()
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        command = [sys.executable, "-c", OTHER_PROCESS, str(there.fileno()), str(size)]
        with subprocess.Popen(command, pass_fds=[there.fileno()]) as other:
            descriptor = memory.share()
            socket.send_fds(here, [b"."], [descriptor])
            os.close(descriptor)
            assert other.wait(120) == 0
    assert torch.equal(tensor.cpu(), 2 * torch.arange(size // 4, dtype=torch.int32))


def test_memory_outlives_who_made_it() -> None:
    device = torch.device("cuda", 0)
    size = granularity(device)
    memory = make_memory(device, size)
    mapped(device, [memory], torch.int32).fill_(7)
    torch.cuda.synchronize()
    descriptor = memory.share()
    del memory
    try:
        kept = mapped(device, [memory_of(device, descriptor, size)], torch.int32)
    finally:
        os.close(descriptor)
    assert (kept == 7).all().item()
