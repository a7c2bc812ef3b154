"""The table of devices answers to our names and to JAX's, and its numbers are of the right size."""

import pytest

from fusejax.parallel.device_kinds import DEVICE_KINDS, find_device_kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("h100-80g", "H100-80G"),
    ],
)
def test_names_are_found(name, expected):
    found = find_device_kind(name)
    assert found is not None and found.name == expected and found is DEVICE_KINDS[expected]


def test_an_unknown_device_has_no_peak():
    assert find_device_kind("cpu") is None
    assert find_device_kind("NVIDIA H1000") is None


def test_numbers_are_in_flops_and_bytes():
    aliases = [alias.lower() for kind in DEVICE_KINDS.values() for alias in (kind.name, *kind.aliases)]
    assert len(set(aliases)) == len(aliases)
    for kind in DEVICE_KINDS.values():
        assert 1e14 < kind.bf16_flops < 3e15
        assert 15e9 < kind.hbm_bytes < 200e9
        # Every one of these needs 100 to 500 flops per byte to be busy.
        assert 100 < kind.bf16_flops / kind.hbm_bandwidth < 600
        assert kind.network_bandwidth < kind.link_bandwidth < kind.hbm_bandwidth
