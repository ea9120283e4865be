"""The peer in tools/benchmark.py: Transformers' Llama on PyTorch, eager and compiled.

CLM and SLM are written as a PyTorch user would write them: compute all logits, take the cross-entropy of each token,
select the top k by excess loss, and average the losses of the selected tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from tools.benchmark_cases import Size, Ways, Work


def _model(size: Size) -> Any:
    torch.manual_seed(0)
    shape = size.model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            head_dim=shape["head_width"],
            intermediate_size=shape["ff_width"],
            tie_word_embeddings=True,
            pad_token_id=None,
            eos_token_id=None,
        )
    )


def step_ways(size: Size, ratio: float) -> Ways:
    """One train step of CLM and of SLM, eager and compiled."""
    tokens = torch.randint(1, size.model["vocab_size"], (size.rows, size.seq_len + 1))

    def losses(network: Any) -> torch.Tensor:
        logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")

    def arm(selective: bool, compiled: bool) -> Callable[[], object]:
        policy = _model(size)
        reference = copy.deepcopy(policy).eval()
        if compiled:
            policy, reference = torch.compile(policy), torch.compile(reference)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)

        def run_step() -> None:
            loss = losses(policy)
            if selective:
                with torch.no_grad():
                    excess = loss.detach() - losses(reference)
                loss = loss[excess.topk(int(ratio * excess.numel())).indices]
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run_step

    return {
        "torch eager, CLM": arm(False, False),
        "torch eager, SLM online": arm(True, False),
        "torch.compile, CLM": arm(False, True),
        "torch.compile, SLM online": arm(True, True),
    }


def product_ways(size: int) -> Ways:
    """The product of two square float32 matrices of `size` rows."""
    a = torch.ones(size, size)
    return {"PyTorch": lambda: a @ a}


class _Lengths(StoppingCriteria):
    """Stops each row of a batch at its own length."""

    def __init__(self, lengths: torch.Tensor):
        self._lengths = lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._lengths


def generation_ways(size: Size, work: Work) -> Ways:
    """Greedy generation, one batch after another. Each batch runs until its longest continuation ends."""
    network = _model(size).eval()
    prompts, lengths = torch.from_numpy(work.prompts), torch.from_numpy(work.lengths)

    def generate() -> None:
        for batch, new_tokens in zip(prompts.split(size.rows), lengths.split(size.rows)):
            network.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=int(new_tokens.max()),
                do_sample=False,
                stopping_criteria=[_Lengths(batch.shape[1] + new_tokens)],
                pad_token_id=0,
            )

    return {"Transformers' generate": generate}
