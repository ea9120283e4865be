"""The cost of training: floating-point operations (FLOPs) by formula, and the time a run spends."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.decoder import abstract_params, param_count
from rho1_jax.models.families import family_of
from rho1_jax.runtime.files import write_text

LEDGER_FILE = "ledger.json"


class Chip(NamedTuple):
    """Peak figures of one chip, from its vendor.

    Attributes:
      flops: bfloat16 FLOPs per second.
      memory: bytes.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that the chip receives over all its links to other chips.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# Keyed by `jax.Device.device_kind`. From cloud.google.com/tpu/docs/system-architecture-tpu-vm and NVIDIA's data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1640e9, 448e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass, per token: two per weight, plus attention over the average number of keys.

    Attributes:
      layers: FLOPs of the decoder layers.
      head: FLOPs of the output head.
      few: the part of `layers` whose gradient `config.backward` takes from few tokens.
    """

    layers: float
    head: float
    few: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, seq_len: int) -> "ForwardFlops":
        """Count the FLOPs of `model` on rows of `seq_len` tokens.

        Assumes one document per row. With shorter documents, attention costs less.
        """
        embedding = model.vocab_size * model.width
        weights = param_count(model) - embedding * (1 if model.tied_embeddings else 2)
        structure = family_of(model).structure(model)
        keys = sum(seen_keys(seq_len, structure.kind(model, layer).window) for layer in range(model.layers))
        attention = 4 * model.heads * model.head_width * keys
        layers = abstract_params(model)["layers"]
        few = [layers["attention"]["q"], layers["attention"]["o"], *jax.tree.leaves(layers["feed_forward"])]
        return cls(2 * weights + attention, 2 * embedding, 2 * sum(leaf.size for leaf in few))

    @property
    def total(self) -> float:
        """FLOPs of layers and output head."""
        return self.layers + self.head


def seen_keys(seq_len: int, sliding_window: int | None) -> float:
    """Number of keys that causal attention reads per query, averaged over a row of `seq_len`."""
    window = min(sliding_window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def training_flops(
    policy: ForwardFlops,
    reference: ForwardFlops | None,
    tokens: float,
    selected: float,
    backward_tokens: float = 1.0,
) -> dict[str, float]:
    """Model FLOPs of training, by part. Recomputation to save memory does not count.

    Args:
      policy: forward FLOPs of the model being trained.
      reference: forward FLOPs of the reference that runs in the train step; None if the step has no reference.
      tokens: number of tokens in the batches.
      selected: number of these that were selected for training. Only they go through the head's backward pass.
      backward_tokens: `config.backward.tokens`.
    """
    layers = policy.layers - (1 - backward_tokens) * policy.few
    return {
        "policy_forward": tokens * policy.total,
        "policy_backward": 2 * (tokens * layers + selected * policy.head),
        "reference_forward": tokens * reference.total if reference else 0.0,
    }


class Ledger:
    """Totals the FLOPs of a run, and the time since its latest start, for ledger.json."""

    def __init__(
        self,
        start_time: float,
        policy: ForwardFlops,
        reference: ForwardFlops | None,
        scoring_flops: float,
        devices: Sequence[jax.Device],
        backward_tokens: float = 1.0,
    ):
        """Start an empty ledger.

        Args:
          start_time: when the program started, from `time.monotonic`.
          policy: forward FLOPs of the model being trained.
          reference: forward FLOPs of the reference in the train step; None if the step has no reference.
          scoring_flops: FLOPs of scoring every row once, if the run reads stored reference losses.
          devices: the chips of the run.
          backward_tokens: `config.backward.tokens`.
        """
        self._start_time, self._policy, self._reference, self._devices = start_time, policy, reference, devices
        self._scoring_flops, self._backward_tokens = scoring_flops, backward_tokens
        self._chip = CHIPS.get(devices[0].device_kind)
        self._step_tokens = self._step_seconds = 0.0

    def add_steps(self, tokens: int, seconds: float) -> None:
        """Add the tokens and time of compiled train steps, without evaluations and checkpoints."""
        self._step_tokens += tokens
        self._step_seconds += seconds

    def mfu(self, tokens: float, selected: float, seconds: float) -> float | None:
        """Model FLOPs utilization: training FLOPs as a share of the chips' peak. None for chips not in CHIPS."""
        if self._chip is None:
            return None
        return sum(self._flops(tokens, selected).values()) / seconds / (self._chip.flops * len(self._devices))

    def _flops(self, tokens: float, selected: float) -> dict[str, float]:
        return training_flops(self._policy, self._reference, tokens, selected, self._backward_tokens)

    def write(self, workdir: pathlib.Path, tokens: int, selected: int) -> None:
        """Write ledger.json for a run that has seen `tokens` and trained on `selected` of them."""
        seconds = time.monotonic() - self._start_time
        statistics = [device.memory_stats() or {} for device in self._devices if device in jax.local_devices()]
        peaks = [memory["peak_bytes_in_use"] for memory in statistics if "peak_bytes_in_use" in memory]
        rate = self._step_tokens / self._step_seconds if self._step_seconds else None
        share = selected / tokens if tokens else 0.0
        ledger = {
            "chips": len(self._devices),
            "chip": self._devices[0].device_kind,
            "tokens_seen": tokens,
            "tokens_selected": selected,
            "flops": self._flops(tokens, selected) | {"scoring": self._scoring_flops},
            "seconds": seconds,
            "step_seconds": self._step_seconds,
            "goodput": self._step_seconds / seconds,
            "tokens_per_second_per_chip": rate and rate / len(self._devices),
            "mfu": rate and self.mfu(rate, share * rate, 1.0),
            "peak_memory_gib": max(peaks) / 2**30 if peaks else None,
        }
        write_text(workdir / LEDGER_FILE, json.dumps(ledger, indent=2) + "\n")
