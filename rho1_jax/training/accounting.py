"""What training costs: floating-point operations (FLOPs) by arithmetic, and where the time of a run goes."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.decoder import param_count
from rho1_jax.runtime.files import write_text

LEDGER_FILE = "ledger.json"


class Chip(NamedTuple):
    """A maker's figures, per chip.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second into the chip over all its links to others.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# By `jax.Device.device_kind`. TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm; GPUs: NVIDIA's data sheets.
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
    """Operations of one token's forward pass, two a weight, and attention over the keys it sees on average."""

    layers: float
    head: float

    @classmethod
    def of(cls, model: ModelConfig, seq_len: int) -> "ForwardFlops":
        """Of a token in rows of `seq_len`, each one document: shorter ones have less attention."""
        embedding = model.vocab_size * model.width
        weights = param_count(model) - embedding * (1 if model.tied_embeddings else 2)
        attention = 4 * model.layers * model.heads * model.head_width * seen_keys(seq_len, model.sliding_window)
        return cls(2 * weights + attention, 2 * embedding)

    @property
    def total(self) -> float:
        """Layers and output head."""
        return self.layers + self.head


def seen_keys(seq_len: int, sliding_window: int | None) -> float:
    """How many keys a query of a row sees on average."""
    window = min(sliding_window or seq_len, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def training_flops(
    policy: ForwardFlops, reference: ForwardFlops | None, tokens: float, selected: float
) -> dict[str, float]:
    """Model FLOPs of training: what the method needs. What is computed twice to save memory does not count.

    Args:
      policy: of the model in training.
      reference: of the one that runs in the step; None where there is none.
      tokens: that went through the models.
      selected: of these, those that were trained on. The head's backward pass is for them alone.
    """
    return {
        "policy_forward": tokens * policy.total,
        "policy_backward": 2 * (tokens * policy.layers + selected * policy.head),
        "reference_forward": tokens * reference.total if reference else 0.0,
    }


class Ledger:
    """Where the operations of a run and the time of its latest start went; ledger.json in its directory."""

    def __init__(
        self,
        start_time: float,
        policy: ForwardFlops,
        reference: ForwardFlops | None,
        scoring_flops: float,
        devices: Sequence[jax.Device],
    ):
        """A ledger that is empty.

        Args:
          start_time: of the program, by `time.monotonic`.
          policy: the model in training.
          reference: that of the step; None where there is none.
          scoring_flops: that the stored losses took which the run reads, of all rows once.
          devices: the chips.
        """
        self._start_time, self._policy, self._reference, self._devices = start_time, policy, reference, devices
        self._scoring_flops = scoring_flops
        self._chip = CHIPS.get(devices[0].device_kind)
        self._step_tokens = self._step_seconds = 0.0

    def add_steps(self, tokens: int, seconds: float) -> None:
        """Counts steps that were already compiled, evaluations and checkpoints left out."""
        self._step_tokens += tokens
        self._step_seconds += seconds

    def mfu(self, tokens: float, selected: float, seconds: float) -> float | None:
        """Model FLOPs utilization: the share of the chips' peak that training used. None on chips not in CHIPS."""
        if self._chip is None:
            return None
        flops = sum(training_flops(self._policy, self._reference, tokens, selected).values())
        return flops / seconds / (self._chip.flops * len(self._devices))

    def write(self, workdir: pathlib.Path, tokens: int, selected: int) -> None:
        """Writes ledger.json for a run that went through `tokens`, and trained on `selected` of them, in all."""
        seconds = time.monotonic() - self._start_time
        statistics = [device.memory_stats() or {} for device in self._devices if device in jax.local_devices()]
        peaks = [found["peak_bytes_in_use"] for found in statistics if "peak_bytes_in_use" in found]
        rate = self._step_tokens / self._step_seconds if self._step_seconds else None
        share = selected / tokens if tokens else 0.0
        ledger = {
            "chips": len(self._devices),
            "chip": self._devices[0].device_kind,
            "tokens_seen": tokens,
            "tokens_selected": selected,
            "flops": training_flops(self._policy, self._reference, tokens, selected) | {"scoring": self._scoring_flops},
            "seconds": seconds,
            "step_seconds": self._step_seconds,
            "goodput": self._step_seconds / seconds,
            "tokens_per_second_per_chip": rate and rate / len(self._devices),
            "mfu": rate and self.mfu(rate, share * rate, 1.0),
            "peak_memory_gib": max(peaks) / 2**30 if peaks else None,
        }
        write_text(workdir / LEDGER_FILE, json.dumps(ledger, indent=2) + "\n")
