"""What accelerators can do at most, to measure utilisation and bounds against."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The peaks of one device, as jax counts devices.

    Attributes:
        name: the name that people use.
        flops: dense bfloat16 operations a second.
        memory: bytes of HBM.
        memory_bandwidth: bytes a second from and to HBM, together.
        interconnect: bytes a second that the device can send to its neighbours (ICI, NVLink), all
            links together; vendors add up both directions and quote twice as much.
        data_center: bytes a second that it can send to devices of other slices, over the data
            center's network; None: not known.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    interconnect: float
    data_center: float | None = None


_V4 = Chip(
    name="TPU v4",
    flops=275e12,
    memory=32 * GIB,
    memory_bandwidth=1228e9,
    interconnect=300e9,
)
_V5E = Chip(
    name="TPU v5e",
    flops=197e12,
    memory=16 * GIB,
    memory_bandwidth=819e9,
    interconnect=200e9,
    data_center=25e9 / 8,
)
_V5P = Chip(
    name="TPU v5p",
    flops=459e12,
    memory=95 * GIB,
    memory_bandwidth=2765e9,
    interconnect=600e9,
    data_center=50e9 / 8,
)
_V6E = Chip(
    name="TPU v6e",
    flops=918e12,
    memory=32 * GIB,
    memory_bandwidth=1638e9,
    interconnect=400e9,
    data_center=100e9 / 8,
)
# A chip has two TensorCores, and jax shows each as a device: half of everything.
_TPU7X = Chip(
    name="TPU7x, a core",
    flops=2307e12 / 2,
    memory=192 * GIB // 2,
    memory_bandwidth=7380e9 / 2,
    interconnect=600e9 / 2,
    data_center=100e9 / 8 / 2,
)
_A100 = Chip(
    name="NVIDIA A100 80GB",
    flops=312e12,
    memory=80 * 10**9,
    memory_bandwidth=2039e9,
    interconnect=300e9,
)
_H100 = Chip(
    name="NVIDIA H100",
    flops=989e12,
    memory=80 * 10**9,
    memory_bandwidth=3350e9,
    interconnect=450e9,
)
_H200 = Chip(
    name="NVIDIA H200",
    flops=989e12,
    memory=141 * 10**9,
    memory_bandwidth=4800e9,
    interconnect=450e9,
)
_B200 = Chip(
    name="NVIDIA B200",
    flops=2250e12,
    memory=180 * 10**9,
    memory_bandwidth=8000e9,
    interconnect=900e9,
)

# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x, of v5e and v6e the data center's
# network of a pod divided by its 256 chips; v4's links also in Jouppi et al.
# 2023, arXiv 2304.01433 (six of 50 GB/s each way). NVIDIA: the data sheets of A100 80GB SXM, H100
# SXM, H200 SXM and DGX B200, there with sparsity for H100 and newer: half of it is dense.
CHIPS: dict[str, Chip] = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H200,
    "NVIDIA B200": _B200,
}
"""jax's `device_kind` -> peaks; names that jax used before, or may use, are there as well."""


def chip_of(device_kind: str) -> Chip | None:
    """Looks up a device by jax's name of its kind; None if its peaks are not known (a CPU).

    Variants with other peaks (H100 PCIe, A100 40GB) are not guessed from their relatives.
    """
    return CHIPS.get(device_kind)
