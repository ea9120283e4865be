"""The registry of model families. docs/guides/add_family.md adds one, step by step, without changing this package."""

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families import gpt_neox, granite, llama, mistral, phi3, qwen2, qwen3
from rho1_jax.models.families.family import ConfigJson, Family, Tensor
from rho1_jax.runtime.errors import UserError

__all__ = ["FAMILIES", "ConfigJson", "Family", "Tensor", "family_of", "register_family"]

BUILT_IN = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
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
      UserError: no family of that name is registered, or a key has a value that the family would not read.
    """
    if model.family not in FAMILIES:
        raise UserError(
            f"config.model.family={model.family!r} is not one of {', '.join(FAMILIES)}; "
            "load your own with --plugin=FILE.py"
        )
    family = FAMILIES[model.family]
    for key in sorted({key for other in FAMILIES.values() for key in other.optional_keys} - set(family.optional_keys)):
        value, default = getattr(model, key), getattr(DEFAULTS, key)
        if value != default:
            raise UserError(
                f"config.model.{key}={value!r}: the family {family.name} has no such switch, only {default!r}"
            )
    return family
