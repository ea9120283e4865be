"""The registry of model families. docs/guides/add_family.md adds one, step by step, without changing this package."""

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import (
    gemma2,
    gemma3,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from rho1_jax.models.families.family import OPTIONAL_KEYS, ConfigJson, Family, Tensor, every_nth
from rho1_jax.runtime.errors import UserError

__all__ = ["FAMILIES", "ConfigJson", "Family", "Tensor", "every_nth", "family_of", "register_family"]

BUILT_IN = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    olmo2.FAMILY,
    smollm3.FAMILY,
    gpt_neox.FAMILY,
    granite.FAMILY,
    phi3.FAMILY,
)
DEFAULTS = ModelConfig()
FAMILIES: dict[str, Family] = {family.name: family for family in BUILT_IN}


def register_family(family: Family) -> None:
    """Adds a family to the registry. A family of yours that is registered again (a config loaded twice) is replaced.

    Raises:
      ValueError: the name is that of a built-in family, or another family has the architecture.
    """
    for other in FAMILIES.values():
        same_name, same_architecture = family.name == other.name, family.architecture == other.architecture
        if (same_name and other in BUILT_IN) or (same_architecture and not same_name):
            raise ValueError(f"family {family.name} ({family.architecture}): {other.name} is registered already")
    FAMILIES[family.name] = family


def family_of(model: ModelConfig) -> Family:
    """The family of a model.

    Raises:
      UserError: no family of that name is registered, or the model sets a key that the family does not read.
    """
    if model.family not in FAMILIES:
        raise UserError(
            f"config.model.family={model.family!r} is not one of {', '.join(FAMILIES)}; "
            "load your own with --plugin=FILE.py"
        )
    family = FAMILIES[model.family]
    for key in OPTIONAL_KEYS:
        value = getattr(model, key)
        if key not in family.optional_keys and value != getattr(DEFAULTS, key):
            raise UserError(f"config.model.{key}={value}: the family {family.name} does not use this key")
    return family
