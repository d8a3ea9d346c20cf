"""Averages of the parameters in a run: what is measured, saved and read again."""

import json

import numpy as np
import pytest

import nha_jax
from tests.support.train.tiny_run import Nha
from train.text.loading import load_model

SHORT = [
    "--steps=6",
    "--checkpoint.every=3",
    "--evaluation.every=3",
    "--evaluation.sequences=8",
    "--evaluation.final_sequences=8",
    "--sample.max_new_tokens=1",
]
TOKENS = np.arange(12)[None]


@pytest.mark.slow
def test_a_moving_average_is_measured_and_saved_beside_the_model(nha: Nha) -> None:
    arguments = [*SHORT, "--optimizer.ema_decay=0.9"]
    assert "its moving average" in nha.train(*arguments)
    (row,) = (row for row in nha.rows() if row["step"] == 3)
    assert row["held_out_ema_bits_per_byte"] > row["held_out_bits_per_byte"]  # it lags behind
    result = json.loads((nha.run / "result.json").read_text())
    last = nha.rows()[-1]
    for name in ("held_out_bits_per_byte", "held_out_ema_bits_per_byte"):
        assert result[name] == last[name]
    model, average = (nha_jax.load(nha.run / name) for name in ("model", "model_ema"))
    np.testing.assert_array_equal(model(TOKENS), load_model(nha.run)(TOKENS))
    assert np.abs(np.subtract(model(TOKENS), average(TOKENS))).max() > 1e-3
    assert "This run is finished" in nha.train(*arguments)


@pytest.mark.slow
def test_a_schedule_free_run_is_judged_by_its_average(nha: Nha) -> None:
    arguments = [*SHORT, "--optimizer.name=schedule_free_adamw", "--optimizer.beta1=0.5"]
    nha.train(*arguments)
    saved = nha_jax.load(nha.run / "model")
    # Of the checkpoint the average is made again.
    np.testing.assert_array_equal(saved(TOKENS), load_model(nha.run)(TOKENS))
    rates = [row["learning_rate"] for row in nha.rows()]
    np.testing.assert_allclose(rates[4:], 3e-3, rtol=1e-6)
