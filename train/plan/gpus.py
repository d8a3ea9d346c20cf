"""GPUs as XLA must know them to compile for one that is not there."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU; the numbers are its driver's.

    Attributes:
        device_kind: jax's name for it, as in `train.devices.chips.CHIPS`.
        capability: major and minor version of its instruction set.
        cores: number of streaming multiprocessors.
        fpus_per_core: number of float32 units of each.
        shared_memory: bytes of shared memory of each; a block of threads may have 1024 less.
        l2_cache: bytes of the L2 cache.
        clock: clock rate in GHz.
        memory: bytes of main memory.
        memory_bandwidth: bytes a second to and from main memory.
    """

    device_kind: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory: int
    l2_cache: int
    clock: float
    memory: int
    memory_bandwidth: int

    @property
    def target_config(self) -> str:
        """The description as text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_core: {self.shared_memory}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              l2_cache_size: {self.l2_cache}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.memory_bandwidth}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.device_kind}"
        """


_MIB = 2**20

# Taken from XLA's own collection of device descriptions.
GPUS = {
    "A100": Gpu(
        device_kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        shared_memory=164 * 1024,
        l2_cache=40 * _MIB,
        clock=1.41,
        memory=85_100_068_864,
        memory_bandwidth=2_039_040_000_000,
    ),
    "H100": Gpu(
        device_kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        shared_memory=228 * 1024,
        l2_cache=50 * _MIB,
        clock=1.98,
        memory=84_942_979_072,
        memory_bandwidth=3_352_320_000_000,
    ),
    "H200": Gpu(
        device_kind="NVIDIA H200",
        capability=(9, 0),
        cores=132,
        fpus_per_core=128,
        shared_memory=228 * 1024,
        l2_cache=50 * _MIB,
        clock=1.98,
        memory=151_397_597_184,
        memory_bandwidth=4_800_000_000_000,
    ),
    "B200": Gpu(
        device_kind="NVIDIA B200",
        capability=(10, 0),
        cores=148,
        fpus_per_core=128,
        shared_memory=228 * 1024,
        l2_cache=132_644_864,
        clock=1.965,
        memory=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
    ),
}
