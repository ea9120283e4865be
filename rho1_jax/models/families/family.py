"""What a model family is: its structure, its config.json, and its tensors in a Hugging Face folder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.structure import Structure

ConfigJson = Mapping[str, Any]
# Keys of ModelConfig that only some families read. The others refuse them.
OPTIONAL_KEYS = (
    "global_every",
    "rope_local_theta",
    "no_rope_every",
    "attention_soft_cap",
    "logit_soft_cap",
    "rope_short_factors",
    "rope_long_factors",
    "rope_attention_factor",
    "rope_fraction",
    "parallel_residual",
    "embedding_scale",
    "residual_scale",
    "query_scale",
    "logit_divisor",
)


class Tensor(NamedTuple):
    """The Hugging Face tensor that stores a parameter, alone or fused with others.

    Parameters whose rows of the table name the same tensor are its parts, in the order of the table. A | in `hf_axes`
    is where the parts follow one another: in "|HC D" and "|KC D" along the whole axis; in "H|C D", head by head.

    Attributes:
      name: of the tensor; {n} stands for the layer.
      axes: of the parameter, without N, one letter each.
      hf_axes: axes of the Hugging Face tensor, separated by spaces. Letters written together form one axis. At most one
        letter stands before a |.
    """

    name: str
    axes: str
    hf_axes: str

    @property
    def stacked(self) -> bool:
        """True if every layer has such a tensor."""
        return "{n}" in self.name


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      name: value of config.model.family.
      architecture: the class that config.json names in `architectures`.
      model_type: `model_type` in config.json.
      tensors: parameter path -> Hugging Face tensor, for every parameter that a model of the family may have.
      structure: the switches of the decoder, from a model's sizes.
      from_hf: fields of ModelConfig, from config.json and its path (for errors). They override the common ones, which
        are the sizes, the rotary positions and `tied_embeddings`.
      to_hf: keys of config.json beyond the common ones. Raises UserError if the family cannot express the model.
      constants: keys of config.json with the only value that the family computes. Export writes them; import refuses
        any other value.
      required: keys of config.json that import needs, beyond the common ones, because Transformers' default for a
        missing key is not ours.
      defaults: Transformers' defaults for keys that config.json may lack, where they are not ours.
      renamed: common keys of config.json -> the family's own names for them.
      optional_keys: those of OPTIONAL_KEYS that the family reads.
    """

    name: str
    architecture: str
    model_type: str
    tensors: Mapping[str, Tensor]
    structure: Callable[[ModelConfig], Structure] = lambda model: Structure(windows=(model.sliding_window,))
    from_hf: Callable[[ConfigJson, str], dict[str, Any]] = lambda hf_config, path: {}
    to_hf: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    constants: ConfigJson = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    required: tuple[str, ...] = ("num_key_value_heads",)
    defaults: ConfigJson = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional_keys: tuple[str, ...] = ()


T = TypeVar("T")


def every_nth(period: int, layers: int, other: T, nth: T) -> tuple[T, ...]:
    """A pattern over the layers: `nth` for one layer in `period`, the last of them, and `other` for the rest."""
    return (other,) * (period - 1) + (nth,) if period <= layers else (other,)


def period_of(is_nth: Sequence[bool], default: int) -> int | None:
    """The period with which a list by layer is True, as in `every_nth`.

    Args:
      is_nth: True for the layers that differ from the others.
      default: the period to return, if it is longer than the list, for a list without True.

    Returns:
      The period; None if the list is not periodic in this way.
    """
    period = is_nth.index(True) + 1 if True in is_nth else max(default, len(is_nth) + 1)
    return period if all(value == ((n + 1) % period == 0) for n, value in enumerate(is_nth)) else None
