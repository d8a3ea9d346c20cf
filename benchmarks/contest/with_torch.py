"""PyTorch's contenders: chunk_gsa of flash-linear-attention, alone and beside a window.

python -m contest.with_torch    started by operator_gpu.py
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from contest.worker import Pass, Shape, serve

L2_CACHE = 50 * 2**20


class Torch:
    """A `Framework`."""

    def facts(self) -> dict[str, Any]:
        import fla
        import triton

        return {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "flash-linear-attention": getattr(fla, "__version__", "unknown"),
            "driver": _driver(),
            "device": torch.cuda.get_device_name(),
        }

    def prepare(self, shape: Shape, direction: Pass) -> dict[str, Callable[[int], float] | str]:
        contenders = {
            "chunk_gsa": _slots,
            "chunk_gsa + window": functools.partial(_hybrid, shape.W, _window(shape.W, shape.T)),
        }
        count = max(2, -(-4 * L2_CACHE // shape.input_bytes))
        sets = [_inputs(shape, seed) for seed in range(min(count, 8))]
        backward = direction == "forward + backward"
        prepared: dict[str, Callable[[int], float] | str] = {}
        for name, attention in contenders.items():
            timed = functools.partial(_time, attention, itertools.cycle(sets), backward)
            try:
                timed(1)
                prepared[name] = timed
            except Exception as error:  # the others still count
                prepared[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        return prepared

    def kernels(self, contender: str) -> list[tuple[str, float]]:
        raise NotImplementedError("only of ours")


def _inputs(shape: Shape, seed: int) -> tuple[torch.Tensor, ...]:
    """query, key, value, s, log decay, the output's cotangent, all in bfloat16.

    Key and value heads are repeated for their groups, as NHA's authors have it.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(heads: int, size: int) -> torch.Tensor:
        return torch.randn(
            shape.B, shape.T, heads, size, generator=generator, device="cuda", dtype=torch.bfloat16
        )

    G = shape.Hq // shape.Hkv
    query, cotangent = normal(shape.Hq, shape.K), normal(shape.Hq, shape.K)
    key, value = normal(shape.Hkv, shape.K), normal(shape.Hkv, shape.K)
    log_decay = functional.logsigmoid(normal(shape.Hkv, shape.M)) / 8
    repeated = (x.repeat_interleave(G, dim=2) for x in (key, value, log_decay))
    key, value, log_decay = repeated
    write = (1 - log_decay.exp()).to(torch.bfloat16)
    leaves = (x.detach().requires_grad_() for x in (query, key, value, write, log_decay))
    return (*leaves, cotangent)


def _slots(query, key, value, write, log_decay):
    from fla.ops.gsa import chunk_gsa

    return chunk_gsa(query, key, value, write, log_decay)[0]


def _hybrid(W: int, window, query, key, value, write, log_decay):
    """Slots of the tokens that left the window, and the window, weighed by their log-sum-exps.

    The slots' comes from what chunk_gsa keeps for its backward; nothing flows back through the
    two, which spares this contender a little.
    """
    shifted = (
        functional.pad(x[:, :-W], (0, 0, 0, 0, W, 0)) for x in (key, value, write, log_decay)
    )
    of_slots = _slots(query, *shifted)
    logits = of_slots.grad_fn.saved_tensors[5]  # after q, k, v, s and g
    if logits.shape != write.shape:
        raise RuntimeError(f"chunk_gsa keeps {tuple(logits.shape)} where its logits were")
    slots_mass = torch.logsumexp(logits.float(), -1)
    of_window, window_mass = window(query, key, value)
    share = torch.sigmoid(slots_mass - window_mass.detach())[..., None].to(of_slots.dtype)
    return share * of_slots + (1 - share) * of_window


def _window(W: int, T: int):
    """Attention to the last W tokens, and its log-sum-exp: flash_attn's, or else flex_attention's.

    [B, T, H, K] -> [B, T, H, K], [B, T, H].
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return _flex_window(W, T)

    def attend(query, key, value):
        out, mass, _ = flash_attn_func(
            query, key, value, causal=True, window_size=(W - 1, 0), return_attn_probs=True
        )
        return out, mass.transpose(1, 2)

    return attend


def _flex_window(W: int, T: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch, head, row, column):
        return (column <= row) & (column > row - W)

    mask = create_block_mask(visible, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention)

    def attend(query, key, value):
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        out, mass = compiled(*heads_first, block_mask=mask, return_lse=True)
        return out.transpose(1, 2), mass.transpose(1, 2)

    return attend


def _time(attention, inputs, backward: bool, calls: int) -> float:
    """Seconds between CUDA events around the whole queue."""
    sets = [next(inputs) for _ in range(calls)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for *arrays, cotangent in sets:
        out = attention(*arrays)
        if backward:
            torch.autograd.grad(out, arrays, cotangent)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _driver() -> str:
    from pathlib import Path

    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "unknown"


if __name__ == "__main__":
    serve(Torch())
