"""The registry of model families. docs/guides/add_family.md adds one, step by step, without changing this package."""

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import llama, mistral, qwen2, qwen3
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.runtime.errors import UserError

__all__ = ["FAMILIES", "ConfigJson", "Family", "Tensor", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Adds a family to the registry. Raises ValueError if its name or its architecture is registered already."""
    for other in FAMILIES.values():
        if family.name == other.name or family.architecture == other.architecture:
            raise ValueError(f"family {family.name} ({family.architecture}): {other.name} is registered already")
    FAMILIES[family.name] = family


def family_of(model: ModelConfig) -> Family:
    """The family of a model. Raises UserError if no family of that name is registered."""
    if model.family not in FAMILIES:
        raise UserError(
            f"config.model.family={model.family!r} is not one of {', '.join(FAMILIES)}; "
            "if it is your own, import the module that registers it"
        )
    return FAMILIES[model.family]


for _module in (llama, mistral, qwen2, qwen3):
    register_family(_module.FAMILY)
