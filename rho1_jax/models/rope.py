"""Rotary positions (arXiv 2104.09864).

All of a head rotates, or only its first coordinates (`rope_fraction`).

The scaling "long" (LongRoPE, arXiv 2402.13753) has two factors for each wave: one for rows up to the original length,
and one for longer rows. The length of the row decides, so a token does not depend on tokens after it, and all documents
of a row are treated alike. In generation, that is the length that the row may reach: prompt plus `max_new_tokens`. If
the factors changed on the way, the keys in the cache would be wrong. Transformers does change them, and computes the
cache again, so it generates the same only if prompt and continuation are on the same side of the original length.

Shapes: B batch rows, L sequence, H heads, C head width, c pairs that rotate: C / 2 if all of a head rotates.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rho1_jax.configs.default import ModelConfig
from rho1_jax.runtime.errors import UserError


class Rotation(NamedTuple):
    """The rotary positions of a layer for rows of a known length.

    Attributes:
      frequencies: [c], or [B, 1, 1, c] if they differ between rows, in radians per position.
      factor: multiplies the rotated coordinates.
    """

    frequencies: np.ndarray | jax.Array
    factor: float


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer. The attribute NAME is the key rope_NAME of `ModelConfig`."""

    theta: float
    scaling: str = "llama3"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    fraction: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig) -> "Rope":
        """The rotary positions that a model's keys describe."""
        return cls(**{field.name: getattr(model, f"rope_{field.name}") for field in dataclasses.fields(cls)})

    def rotation(self, head_width: int, length: int | jax.Array) -> Rotation:
        """The rotation for rows of a length, or of the lengths [B]."""
        if self.scaling != "long":
            return Rotation(self.frequencies(head_width), 1.0)
        short_c, long_c = (
            self.frequencies(head_width) / factors for factors in (self.short_factors, self.long_factors)
        )
        if isinstance(length, int):
            return Rotation(long_c if length > self.original_length else short_c, self.attention_factor)
        is_long_B111 = (length > self.original_length)[:, None, None, None]
        frequencies_B11c = jnp.where(is_long_B111, long_c.astype(np.float32), short_c.astype(np.float32))
        return Rotation(frequencies_B11c, self.attention_factor)

    def frequencies(self, head_width: int) -> np.ndarray:
        """Frequencies [c] for a head, in radians per position, without the factors of the scaling "long".

        A `factor` above 1 stretches the waves. The scaling "linear" stretches all of them. The scaling "llama3"
        stretches those with fewer than `low_frequency_factor` turns in the original length, and leaves those with more
        than `high_frequency_factor` turns alone. Between the two, it interpolates linearly.
        """
        half = rotated_width(head_width, self.fraction) // 2
        frequencies = self.theta ** (-np.arange(half) / half)
        if self.scaling == "long":
            return frequencies
        if self.scaling == "linear":
            return frequencies / self.factor
        turns = self.original_length * frequencies / (2 * np.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotated_width(head_width: int, fraction: float) -> int:
    """The number of coordinates of a head that rotate."""
    return int(head_width * fraction)


def check_rope(model: ModelConfig) -> None:
    """Raises UserError if the part of a head that rotates is odd or empty, or lacks a long or short factor per pair."""
    rotated = rotated_width(model.head_width, model.rope_fraction)
    if rotated % 2 or not rotated:
        raise UserError(
            f"config.model.rope_fraction={model.rope_fraction} of config.model.head_width={model.head_width} is "
            f"{rotated}: rotary positions need pairs"
        )
    if model.rope_scaling == "long":
        for key in ("rope_short_factors", "rope_long_factors"):
            factors = getattr(model, key)
            if len(factors) != rotated // 2:
                raise UserError(f"config.model.{key} has {len(factors)} factors, but {rotated // 2} pairs rotate")


def rotate(x_BLHC: jax.Array, positions_BL: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates each pair by position times frequency. Pairs join the two halves of the part of a head that rotates."""
    frequencies = rotation.frequencies.astype(np.float32)
    angles_BL1c = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles_BL1c), jnp.cos(angles_BL1c)
    if rotation.factor != 1:
        sin, cos = rotation.factor * sin, rotation.factor * cos
    x, rest = x_BLHC.astype(jnp.float32), []
    width = 2 * frequencies.shape[-1]
    if width < x.shape[-1]:
        x, rest = x[..., :width], [x[..., width:]]
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated + rest, axis=-1).astype(x_BLHC.dtype)
