"""A program: prefixes kept on eight devices give the texts of one device that keeps none."""

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from nha_jax import Engine, Model, SamplingOptions
from tests.nha_jax.generation.test_engine import tiny_model

SHAPE = {"batch_size": 4, "max_length": 64, "prefill_rows": 4, "prefill_chunk": 8}
BEGINNING = np.random.default_rng(0).integers(0, 24, 20)
PROMPTS = [np.concatenate([BEGINNING, [number, 3]]) for number in range(4)]


def texts(engine: Engine) -> list[list[int]]:
    requests = [
        engine.submit(prompt, SamplingOptions(max_new_tokens=6, seed=number))
        for number, prompt in enumerate(PROMPTS)
    ]
    found: dict[int, list[int]] = {request: [] for request in requests}
    for event in engine.run():
        found[event.request].append(event.token)
    return list(found.values())


def check(model: Model, wanted: list[list[int]], *, on_host: bool) -> Engine:
    engine = Engine(model, **SHAPE, prefix_bytes=2**24, prefixes_on_host=on_host)
    with engine.prefix(BEGINNING) as prefix:
        assert prefix.num_tokens == 16
        assert texts(engine) == wanted
    assert engine.prefix_statistics.tokens_saved == 4 * 16
    return engine


def main() -> None:
    model = tiny_model(num_kv_heads=2, conv_width=4)
    wanted = texts(Engine(model, **SHAPE))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        engine = check(model, wanted, on_host=False)
        for node in engine._prefixes._nodes:
            assert node.snapshot is not None
            for layer in node.snapshot.layers:
                ring = layer.attention.window_value
                assert ring.sharding.spec == PartitionSpec(None, None, "tensor"), ring.sharding
        check(model, wanted, on_host=True)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"))):  # of explicit axes
        check(model, wanted, on_host=False)
