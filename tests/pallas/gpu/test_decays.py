"""What is made of log decays inside a kernel."""

import numpy as np
import pytest

from pallas.gpu.warpgroup.decays import write_of


@pytest.mark.parametrize("log_decay", [-1e-7, -1e-3, -0.124, -0.126, -1.0, -20.0, -np.inf, 0.0])
def test_write_keeps_float32s_precision_near_zero(log_decay):
    expected = -np.expm1(np.float64(np.float32(log_decay)))
    np.testing.assert_allclose(write_of(np.float32(log_decay)), expected, rtol=3e-6)
