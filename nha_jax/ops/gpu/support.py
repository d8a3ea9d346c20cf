"""Which calls our GPU kernels serve, which cuDNN serves, and on which GPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.backends import Arrays
from nha_jax.ops.kernels import attend_beyond_limits
from nha_jax.ops.timeline import nothing_leaves
from nha_jax.ops.types import Options
from pallas.gpu import LARGEST_HEAD

SHORTEST_OF_CUDNN = 64  # tokens; whether its backward takes fewer depends on its version
Capability = tuple[int, ...]  # compute capability; empty: another maker's GPU, or unknown
AMPERE, HOPPER = (8, 0), (9, 0)
# By a part of the device's kind, which is all that a device to compile for tells.
CAPABILITIES: dict[str, Capability] = {
    "A100": AMPERE,
    "H100": HOPPER,
    "H200": HOPPER,
    "B200": (10, 0),
}


def unsupported(
    arrays: Arrays, *, has_segments: bool, has_past: bool, options: Options
) -> str | None:
    """Says in a line why neither cuDNN nor our kernels serve this call; None if one does.

    The answer is for the GPU that is compiled for; off GPUs our kernels run interpreted.
    """
    if served_by_cudnn(arrays, has_segments=has_segments, has_past=has_past, options=options):
        return None
    if arrays[0].dtype != jnp.bfloat16:
        return f"its kernels multiply in bfloat16, got query of {arrays[0].dtype}"
    return attend_beyond_limits(arrays, LARGEST_HEAD) or not_hopper()


def not_hopper() -> str | None:
    """Says in a line why our kernels can't run on the GPU compiled for; None if they can."""
    device = _gpu_compiled_for()
    if device is not None and _capability(device) != HOPPER:
        return f"its kernels are for Hopper (H100, H200), got {device.device_kind}"
    return None


def served_by_cudnn(
    arrays: Arrays, *, has_segments: bool, has_past: bool, options: Options
) -> bool:
    """Whether cuDNN's full attention computes this call, of which no token leaves the window.

    For packed documents and tokens before the call's it would need a [T, T] bias: those go to our
    kernels, as short sequences do.
    """
    query, key, value, _ = arrays
    T, device = query.shape[1], _gpu_compiled_for()
    if device is None or has_segments or has_past or query.dtype != jnp.bfloat16:
        return False
    capability = _capability(device)
    largest = 256 if capability == HOPPER else 128
    if capability < AMPERE or max(key.shape[3], value.shape[3]) > largest:
        return False
    return T >= SHORTEST_OF_CUDNN and nothing_leaves(options.window_size, T, False)


def compiling_for_gpus() -> bool:
    """Whether what is traced now is for GPUs: by the ambient mesh, or else the default device."""
    return _gpu_compiled_for() is not None


def _gpu_compiled_for() -> Any:
    """Returns the GPU that is compiled for, real or abstract; None if it is no GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.devices()[0] if jax.default_backend() in ("gpu", "rocm") else None
    return device if device.platform in ("gpu", "cuda", "rocm") else None


def _capability(device: Any) -> Capability:
    if not hasattr(device, "compute_capability"):  # abstract: a GPU like those that are here?
        here = jax.devices() if jax.default_backend() in ("gpu", "rocm") else []
        alike = [x for x in here if x.device_kind == device.device_kind]
        if not alike:
            known = (x for name, x in CAPABILITIES.items() if name in device.device_kind)
            return next(known, ())
        device = alike[0]
    parts = str(device.compute_capability).split(".")  # AMD's are gfx942 and the like
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
