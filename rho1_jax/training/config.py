"""A run's config: its typed sections, what is saved of it, and how configs of older versions are read."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import pydantic

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig, RunConfig
from rho1_jax.method.selection import Selection
from rho1_jax.models.attention import ATTENTION
from rho1_jax.models.decoder import REMAT
from rho1_jax.models.families import FAMILIES
from rho1_jax.models.rope import check_rope
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import write_text

CONFIG_FILE = "config.json"
# The fields of the `model` section that say how a model is computed, not which model it is.
RUN_SETTINGS = ("compute_dtype", "attention", "remat", "unroll", "loss_chunk", "logits_gib")


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The `model` section. Raises UserError if its sizes do not fit together."""
    model = ModelConfig(**config.model)
    if model.heads % model.kv_heads:
        raise UserError(f"config.model.kv_heads={model.kv_heads} does not divide config.model.heads={model.heads}")
    if model.head_width % 2:
        raise UserError(f"config.model.head_width={model.head_width} is odd: rotary positions need pairs")
    check_rope(model)
    for key, values in (("family", FAMILIES), ("attention", ATTENTION), ("remat", REMAT)):
        if config.model[key] not in values:
            raise UserError(f"config.model.{key}={config.model[key]!r} is not one of {', '.join(values)}")
    FAMILIES[model.family].check(model)
    return model


def selection_rule(config: ml_collections.ConfigDict) -> Selection:
    """The `selection` section. Raises UserError if a value is not allowed."""
    rule = Selection(**config.selection)
    try:
        rule.check()
    except ValueError as error:
        raise UserError(f"config.selection.{error}") from None
    return rule


def run_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of the `model` section that belong to a run rather than to its model."""
    return {name: config.model[name] for name in RUN_SETTINGS}


def as_saved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back."""
    return json.loads(json.dumps(config.to_dict()))


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Saves the resolved config beside the run."""
    write_text(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def complete(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config saved by any version so far, with every key of this one.

    A key that the older version lacked gets its default. By the rule of configs/default.py, that is how it behaved.

    Raises:
      UserError: a key of the saved config does not exist in this version.
    """
    return _complete(saved, as_saved(default.get_config()), "config", where)


def _complete(saved: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    if not isinstance(saved, Mapping):
        raise UserError(f"{where}: {prefix} is {saved!r}, but it must be a section with keys")
    for key in saved:
        if key not in defaults:
            raise UserError(
                f"{where}: this version of rho1_jax does not know {prefix}.{key}; use the version that wrote it"
            )
    return {
        key: _complete(saved.get(key, {}), value, f"{prefix}.{key}", where)
        if isinstance(value, dict)
        else saved.get(key, value)
        for key, value in defaults.items()
    }


class Change(NamedTuple):
    """A key whose value differs between two configs."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} changed from {self.old!r} to {self.new!r}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "config") -> list[Change]:
    """The keys in which two nested dicts differ, as "config.a.b"."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changes(before, after, f"{prefix}.{key}")
        elif before != after:
            changed.append(Change(f"{prefix}.{key}", before, after))
    return changed


def check_values(config: ml_collections.ConfigDict) -> None:
    """Checks each value against the type that configs/default.py gives its key.

    Raises:
      UserError: a value is out of range, not finite, or not one of those allowed. The message names the key.
    """
    try:
        pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(config.to_dict()), strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key, message = ".".join(map(str, problem["loc"])), problem["msg"]
        raise UserError(f"config.{key}={problem['input']!r}: {message[:1].lower()}{message[1:]}") from None
    model = config.model
    if model.rope_low_frequency_factor >= model.rope_high_frequency_factor:
        raise UserError(
            f"config.model.rope_low_frequency_factor={model.rope_low_frequency_factor} must be below "
            f"config.model.rope_high_frequency_factor={model.rope_high_frequency_factor}"
        )
