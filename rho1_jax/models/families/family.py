"""What a model family is: its structure, its config.json, and its tensors in a Hugging Face folder."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.structure import Structure

ConfigJson = Mapping[str, Any]


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
      optional_keys: keys of config.model that only some families read, and this one does.
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
