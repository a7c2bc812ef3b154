"""What accelerators can do at best, by the name that JAX gives them (`device.device_kind`).

For the share of peak that training reaches, and for predictions without the device. Numbers are the vendors', per
device, dense (without structured sparsity), one direction for links; what a program reaches is less. A processor
without an entry (a CPU) has no known peak, and then nothing is claimed.

Sources, by kind: NVIDIA's data sheets of A100 (2021), L4, L40S, H100, H200, and the DGX B200 and GB200 NVL72 pages;
`docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}`. `network_bandwidth` is the adapter that the vendor's reference
machine gives each GPU (DGX A100: HDR 200 Gb/s, DGX H100 and B200: NDR 400 Gb/s), and 25 Gb/s per TPU chip as an
assumption about the data centre's network, which Google does not state per chip.
"""

from dataclasses import dataclass

__all__ = ["DEVICE_KINDS", "DeviceKind", "find_device_kind"]

GiB = 2**30


@dataclass(frozen=True)
class DeviceKind:
    """One device: a GPU, or a TPU chip (on v4 and v5p both cores of a chip are one JAX device)."""

    name: str  # what `fusejax plan --device` takes
    bf16_flops: float  # multiply-adds count two, per second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second out of one device over all its fast links (NVLink, ICI), one direction
    linked: int  # devices that the fast links join: of one node, or of a whole pod
    network_bandwidth: float  # bytes per second out of one device beyond these
    aliases: tuple[str, ...] = ()  # `device_kind` of JAX

    @property
    def is_tpu(self) -> bool:
        """Whether links form a torus without a switch."""
        return self.name.startswith("v")


_ALL = (
    DeviceKind("A100-40G", 312e12, 40 * GiB, 1.555e12, 300e9, 8, 25e9, ("NVIDIA A100-SXM4-40GB",)),
    DeviceKind("A100-80G", 312e12, 80 * GiB, 2.039e12, 300e9, 8, 25e9, ("NVIDIA A100-SXM4-80GB",)),
    # PCIe boards: NVLink joins two at most, so the bus is what counts.
    DeviceKind("A100-40G-PCIe", 312e12, 40 * GiB, 1.555e12, 32e9, 8, 25e9, ("NVIDIA A100-PCIE-40GB",)),
    DeviceKind("A100-80G-PCIe", 312e12, 80 * GiB, 1.935e12, 32e9, 8, 25e9, ("NVIDIA A100 80GB PCIe",)),
    DeviceKind("L4", 121e12, 24 * GiB, 300e9, 32e9, 8, 12.5e9, ("NVIDIA L4",)),
    DeviceKind("L40S", 362e12, 48 * GiB, 864e9, 32e9, 8, 25e9, ("NVIDIA L40S",)),
    DeviceKind("H100-80G", 989.4e12, 80 * GiB, 3.35e12, 450e9, 8, 50e9, ("NVIDIA H100 80GB HBM3",)),
    DeviceKind("H100-80G-PCIe", 756e12, 80 * GiB, 2.0e12, 64e9, 8, 50e9, ("NVIDIA H100 PCIe",)),
    DeviceKind("H100-NVL", 835e12, 94 * GiB, 3.9e12, 64e9, 8, 50e9, ("NVIDIA H100 NVL",)),
    DeviceKind("H200", 989.4e12, 141 * 10**9, 4.8e12, 450e9, 8, 50e9, ("NVIDIA H200",)),
    DeviceKind("B200", 2250e12, 180 * 10**9, 8.0e12, 900e9, 8, 50e9, ("NVIDIA B200",)),
    DeviceKind("GB200", 2500e12, 186 * 10**9, 8.0e12, 900e9, 72, 50e9, ("NVIDIA GB200",)),
    DeviceKind("v4", 275e12, 32 * GiB, 1.2e12, 300e9, 4096, 3.125e9, ("TPU v4",)),
    DeviceKind("v5e", 197e12, 16 * GiB, 819e9, 200e9, 256, 3.125e9, ("TPU v5 lite", "TPU v5e")),
    DeviceKind("v5p", 459e12, 95 * GiB, 2.765e12, 600e9, 8960, 3.125e9, ("TPU v5", "TPU v5p")),
    DeviceKind("v6e", 918e12, 32 * GiB, 1.64e12, 400e9, 256, 3.125e9, ("TPU v6 lite", "TPU v6e")),
    # Two JAX devices per chip: half of the chip's numbers each.
    DeviceKind("v7x", 1153.5e12, 96 * GiB, 3.69e12, 300e9, 18432, 3.125e9, ("TPU7x", "TPU v7x")),
)
DEVICE_KINDS = {kind.name: kind for kind in _ALL}
_BY_ALIAS = {alias.lower(): kind for kind in _ALL for alias in (kind.name, *kind.aliases)}


def find_device_kind(name: str) -> DeviceKind | None:
    """Returns the entry of a name of ours or of JAX (`jax.devices()[0].device_kind`), None where there is none."""
    return _BY_ALIAS.get(name.strip().lower())
