"""Compares the nucleus with Transformers' top-p (extra `peers`)."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rho1_jax.models.sampling import nucleus

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits_BV = np.random.default_rng(0).normal(0, 2, (50, 1000)).astype(np.float32)
    kept_BV = transformers.TopPLogitsWarper(top_p)(None, torch.tensor(logits_BV)).isfinite().numpy()
    np.testing.assert_array_equal(nucleus(jnp.array(logits_BV), top_p), kept_BV)
