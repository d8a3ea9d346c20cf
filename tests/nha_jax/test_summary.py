"""What a model prints as: a few lines for people."""

import jax
import pytest
import treescope
from flax import nnx

from nha_jax import Model, ModelConfig
from nha_jax.model import abstract_model


def abstract(config: ModelConfig, kind: type[Model] = Model) -> Model:
    return nnx.merge(*abstract_model(config, kind))


def test_a_model_prints_as_its_sizes_windows_and_implementation():
    config = ModelConfig.preset("nha-tiny", num_layers=4, num_kv_heads=1, window_size=(8, None))
    assert repr(abstract(config)).splitlines() == [
        "Model: 841,472 parameters in float32, computed in bfloat16",
        "  layers: 4 of hidden size 128, MLP size 384",
        "  vocabulary: 257, head tied to the embedding",
        "  attention: 2 query heads, 1 key/value heads, key size 64, value size 64, "
        "convolution of 4 taps",
        "  memory: 32 slots a key/value head, window_size 8,None, 2 times over",
        "  implementation: None, the fastest that serves",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 16}, "window_size 16\n"),
        ({"window_size": (8, 8, None)}, "window_size 8,8,None\n"),
        ({"conv_width": 0}, "no convolution"),
        ({"tie_embeddings": False}, "head of its own"),
        ({"implementation": "xla"}, "implementation: xla"),
        ({"dtype": "float32", "param_dtype": "bfloat16"}, "in bfloat16, computed in float32"),
        (
            {"experts": {"count": 6, "per_token": 2, "size": 10}},
            "6 experts of size 10, 2 for each token",
        ),
    ],
)
def test_what_a_config_changes_is_printed(changes, words):
    assert words in str(abstract(ModelConfig.preset("nha-tiny", **changes)))


def test_parameters_are_described_as_they_are():
    graph, state = abstract_model(ModelConfig.preset("nha-tiny"))
    embedding = state["embed"]["embedding"]
    embedding.set_value(jax.ShapeDtypeStruct(embedding.shape, "bfloat16"))
    assert "702,336 parameters in bfloat16 and float32" in repr(nnx.merge(graph, state))


def test_a_subclass_has_its_own_name_and_the_modules_of_a_model_print_as_ever(capsys):
    class Mine(Model):
        pass

    model = abstract(ModelConfig.preset("nha-tiny"), Mine)
    nnx.display(model)
    assert capsys.readouterr().out.startswith("Mine: 702,336 parameters")
    assert "q_proj=Projection(" in repr(model.blocks)
    assert "q_proj=Projection(" in treescope.render_to_text(model)
