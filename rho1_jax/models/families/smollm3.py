"""SmolLM3 (https://huggingface.co/blog/smollm3): Llama without rotary positions in every fourth layer."""

from typing import Any

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.families.family import ConfigJson, Family, every_nth, period_of
from rho1_jax.models.families.llama import TENSORS, refuse_window
from rho1_jax.models.rope import Rope
from rho1_jax.models.structure import Structure
from rho1_jax.runtime.errors import UserError

NO_ROPE_EVERY = 4


def _structure(model: ModelConfig) -> Structure:
    ropes = every_nth(model.no_rope_every or NO_ROPE_EVERY, model.layers, Rope.of(model), None)
    return Structure(windows=(model.sliding_window,), ropes=ropes)


def _from_hf(hf_config: ConfigJson, path: str) -> dict[str, Any]:
    layers, every = hf_config["num_hidden_layers"], hf_config["no_rope_layer_interval"]
    has_rope = hf_config.get("no_rope_layers")
    if has_rope is not None:
        if len(has_rope) < layers:
            raise UserError(f"{path}: no_rope_layers has {len(has_rope)} entries for {layers} layers")
        every = period_of([not value for value in has_rope[:layers]], every)
        if every is None:
            raise UserError(f"{path}: no_rope_layers is not supported: 0 must be at every n-th layer, for a single n")
    if set(hf_config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{path}: layer_types is not supported, except for full_attention in every layer")
    return {"no_rope_every": every}


def _to_hf(model: ModelConfig) -> dict[str, Any]:
    refuse_window(model)
    every = model.no_rope_every or NO_ROPE_EVERY
    return {
        "no_rope_layer_interval": every,
        "no_rope_layers": [int((n + 1) % every != 0) for n in range(model.layers)],
        "layer_types": ["full_attention"] * model.layers,
    }


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    tensors=TENSORS,
    structure=_structure,
    from_hf=_from_hf,
    to_hf=_to_hf,
    constants={"hidden_act": "silu", "use_sliding_window": False},
    defaults={"rope_theta": 2_000_000.0, "no_rope_layer_interval": NO_ROPE_EVERY, "tie_word_embeddings": True},
    optional_keys=("no_rope_every",),
)
