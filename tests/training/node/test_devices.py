"""What a host offers, from the driver's list."""

import pytest
from alto_training.devices import find_devices, short_kind

LISTING = "0, NVIDIA H100 80GB HBM3, 81559\n1, NVIDIA H100 80GB HBM3, 81559\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("Quadro RTX 6000", "rtx-6000"),
    ],
)
def test_short_kinds(name, kind):
    assert short_kind(name) == kind


def test_gpus_are_found(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = find_devices(None, "", "auto", lambda: LISTING)
    assert (found.kind, found.places, found.indices) == ("h100", 2, ("0", "1"))
    assert found.memory_bytes_per_place == 81559 * 1024 * 1024


def test_the_operator_has_the_last_word(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_devices(None, "", "auto", lambda: LISTING).indices == ("1",)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_devices(1, "mine", "auto", lambda: LISTING).kind == "mine"
    assert not find_devices(3, "", "cpu", lambda: LISTING).has_gpus


@pytest.mark.parametrize("listing", [None, "", "No devices were found\n", "0, [N/A], [N/A]\n"])
def test_a_host_without_gpus_offers_its_cpu(listing):
    found = find_devices(None, "", "auto", lambda: listing)
    assert (found.kind, found.places, found.has_gpus) == ("cpu", 1, False)
    assert found.memory_bytes_per_place > 0
