"""Config files on the command line, with errors a user can act on."""

import json
import pathlib
from typing import Any

import ml_collections

from rho1_jax.configs.default import ModelConfig
from rho1_jax.method.selection import Selection
from rho1_jax.models.attention import ATTENTION
from rho1_jax.models.decoder import REMAT
from rho1_jax.models.families import FAMILIES
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import write_text

CONFIG_FILE = "config.json"
# The fields of the `model` section that say how a model is run, not which one it is.
RUN_SETTINGS = ("compute_dtype", "attention", "remat", "unroll", "loss_chunk")


def model_config(config: ml_collections.ConfigDict) -> ModelConfig:
    """The `model` section. Raises UserError where its sizes do not fit together."""
    model = ModelConfig(**config.model)
    if model.heads % model.kv_heads:
        raise UserError(f"config.model.kv_heads={model.kv_heads} does not divide config.model.heads={model.heads}")
    if model.head_width % 2:
        raise UserError(f"config.model.head_width={model.head_width} is odd: rotary positions need pairs")
    for key, values in (("family", FAMILIES), ("attention", ATTENTION), ("remat", REMAT)):
        if config.model[key] not in values:
            raise UserError(f"config.model.{key}={config.model[key]!r} is none of {', '.join(values)}")
    return model


def selection_rule(config: ml_collections.ConfigDict) -> Selection:
    """The `selection` section. Raises UserError where a value cannot be."""
    rule = Selection(**config.selection)
    try:
        rule.check()
    except ValueError as error:
        raise UserError(f"config.selection.{error}") from None
    return rule


def run_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of the `model` section that belong to a run, whatever the model."""
    return {name: config.model[name] for name in RUN_SETTINGS}


def as_saved(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as it will be read back from JSON."""
    return json.loads(json.dumps(config.to_dict()))


def write_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Saves the resolved config beside the run."""
    write_text(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> list[str]:
    """The keys in which two nested dicts differ, as "config.a.b: 1 -> 2"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}.{key}")
        elif before != after:
            found.append(f"{prefix}.{key}: {before!r} -> {after!r}")
    return found
