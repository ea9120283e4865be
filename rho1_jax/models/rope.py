"""Rotary positions (arXiv 2104.09864).

Shapes: B batch rows, L sequence, H heads, C head width, c = C / 2 pairs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax.configs.default import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer. Each attribute is the key of `ModelConfig` that has rope_ before its name."""

    theta: float
    scaling: str = "llama3"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def of(cls, model: ModelConfig) -> "Rope":
        """The rotary positions that a model's keys describe."""
        return cls(**{field.name: getattr(model, f"rope_{field.name}") for field in dataclasses.fields(cls)})

    def frequencies(self, size: int) -> np.ndarray:
        """Frequencies [size / 2] for vectors of a size, in radians per position.

        A `factor` above 1 stretches the waves. The scaling "linear" stretches all of them. The scaling "llama3"
        stretches those with fewer than `low_frequency_factor` turns in the original length, and leaves those with more
        than `high_frequency_factor` turns alone. Between the two, it interpolates linearly.
        """
        half = size // 2
        frequencies = self.theta ** (-np.arange(half) / half)
        if self.scaling == "linear":
            return frequencies / self.factor
        turns = self.original_length * frequencies / (2 * np.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(x_BLHC: jax.Array, positions_BL: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates each pair by position times frequency. Pairs join the two halves of a head, as in Llama."""
    angles_BL1c = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    sin, cos = jnp.sin(angles_BL1c), jnp.cos(angles_BL1c)
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)
