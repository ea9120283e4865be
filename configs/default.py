"""Every key of a training run, with its default. Other configs start from this one.

python -m rho1_jax.train --config=configs/default.py:slm --workdir=DIR --config.data.train=DATA [--config.key=value]
"""

import ml_collections
from ml_collections import config_dict

from rho1_jax.errors import UserError

# The stages of the method, and what they select by.
STAGES = {
    "reference": "none",
    "clm": "none",
    "random": "random",
    "slm": "excess",
    # With a reference trained on the corpus itself (section 3.4).
    "self_reference": "none",
    "self_loss": "reference_loss",
    "self_entropy": "reference_entropy",
    "self_both": "reference_loss & reference_entropy",
}


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """The defaults of a stage, one of STAGES."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: a config has the stages {', '.join(STAGES)}")
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # of initial weights, shuffles and the random score
            "steps": 1000,  # updates in all
            "epochs": 0.0,  # above 0: as many steps as this many passes over the training data take, instead
            "batch_size": 32,  # rows of one step, over all devices and microbatches
            "microbatches": 1,  # parts a step is taken in, to save memory; the update is the same
            "log_every": 10,  # steps between two lines of metrics.jsonl
            "mesh": {
                "data": -1,  # copies of the model; -1: all devices that the other two leave
                "fsdp": 1,  # devices that share parameters, gradients and optimizer state
                "tensor": 1,  # devices that share heads, feed-forward width and vocabulary
            },
            "model": {
                "family": "llama",  # or "mistral", "qwen2" (biases on queries, keys, values), "qwen3" (norms)
                "vocab_size": 0,  # 0: the tokenizer's
                "width": 256,  # D
                "layers": 6,  # N
                "heads": 8,  # H, query heads
                "kv_heads": 4,  # K, divides heads
                "head_width": 32,  # C
                "ff_width": 768,  # F
                "context_length": 0,  # longest row the model is made for; 0: the data's
                "rope_theta": 10_000.0,  # base of the rotary frequencies
                "rope_factor": 1.0,  # stretches slow rotary waves, as Llama 3.1 does with 8; 1: none
                "rope_low_frequency_factor": 1.0,  # turns in the original length below which a wave is stretched fully
                "rope_high_frequency_factor": 4.0,  # turns above which it is not at all
                "rope_original_length": 8192,  # context before the stretching
                "norm_eps": 1e-5,  # of RMSNorm
                "tied_embeddings": True,  # one matrix for input and output
                "sliding_window": config_dict.placeholder(int),  # keys a query sees, itself included; none: all
                "compute_dtype": "float32",  # of activations and of the reference; "bfloat16" on TPU and GPU
                "attention": "auto",  # kernel: "xla", "splash" (TPU), "cudnn" (GPU); "auto": by the devices at hand
                "remat": "none",  # to save memory, computed again for the gradient: "dots" (all but products), "full"
                "unroll": 1,  # layers compiled as one piece of the loop over them; more is faster on CPU
                "loss_chunk": 512,  # tokens of a device whose logits exist at once
            },
            "data": {
                "train": "",  # prepared data sets: DIR, or a mixture by weight DIR1:3,DIR2:1
                "external": "",  # FILE.npy of [rows, seq_len] for each data set, with commas: the score "external"
                "document_mask": True,  # attention stays within documents, positions restart at each
                "prefetch": 4,  # batches read ahead
            },
            "optimizer": {
                "learning_rate": 1e-3,  # peak
                "warmup_fraction": 0.1,  # of the steps; linear, from zero
                "decay": "cosine",  # or "linear"
                "final_learning_rate_fraction": 0.1,  # where the decay ends, relative to the peak
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.1,  # of matrices; norms and biases have none
                "clip_norm": 1.0,  # of the gradient
                "first_moment_dtype": "float32",  # or "bfloat16", to save memory
                "host_offload": False,  # moments stay in the host's memory between updates, where the backend can
            },
            "selection": {
                "score": STAGES[stage],  # "none" (CLM), a name in rho1_jax/scores.py, or as "a:0.7 & b:0.7", "a | b"
                "rule": "ratio",  # the top `ratio`; "threshold", "soft" and "weight" are told in docs/selection.md
                "ratio": 0.6,  # share of the eligible tokens that is trained on, a multiple of 0.0001
                "schedule": "constant",  # of the ratio; "linear", "cosine" or "stepwise": from first_ratio to ratio
                "first_ratio": 1.0,  # where the schedule begins
                "stairs": 4,  # levels of "stepwise"
                "dense_fraction": 0.0,  # of the steps, the first ones, in which every eligible token is trained on
                "threshold": 0.0,  # of the score, for the rules "threshold" and "soft"
                "temperature": 1.0,  # of the rule "soft", in units of the score
                "scope": "global",  # who competes: the tokens of the step, of a "microbatch" or of a "sequence"
            },
            # Both checkpoints may be a run's directory, one of its checkpoints, or a Hugging Face folder.
            "init": {"checkpoint": ""},  # where the first weights come from; empty: random ones
            "reference": {
                "checkpoint": "",  # the model that scores refer to
                "scores": "",  # name of what `rho1_jax.score` stored beside the data; empty: the model runs in the step
                "moves": "",  # from there it follows the policy: "average" of its parameters over time, or "snapshot"
                "decay": 0.999,  # of the average: what a step leaves of it
                "every": 100,  # steps from one snapshot to the next
            },
            "eval": {
                "every": 100,  # steps between two evaluations; there is one at the end in any case
                "data": "",  # losses on the split "eval" of data sets: NAME=DIR,NAME=DIR
                "rows": 256,  # rows of each, at most
                "tasks": "",  # accuracy on math tasks, with commas: gsm8k,math_oai,... of rho1_jax/evals/tasks.py
                "data_dir": "",  # where their files lie: DATA_DIR/gsm8k/test.jsonl
                "task_items": 0,  # of each, the first so many; 0: all
                "exemplars": "",  # NAME=FILE,NAME=FILE of {"question", "solution"} lines, in place of a task's own
                "tool_use": False,  # tasks without exemplars, in the form of transcripts; programs are run
                "questions": "",  # accuracy on JSON lines files: NAME=FILE,NAME=FILE
                "prompt_template": "{question}\n",  # a question's record as a prompt
                "answer_key": "answer",  # the record's key with the right answer
                "answer_pattern": r"####\s*(.+)",  # its group in the last match is the answer
                "stops": ("\n\n",),  # strings that end a generation
                "max_new_tokens": 256,
                "generate_batch": 64,  # prompts decoded together
            },
            "trace": {"first": 0, "last": 0},  # steps recorded for xprof, in WORKDIR/trace; 0: none
            "checkpoint": {
                "every": 100,  # steps between two checkpoints; there is one at the end in any case
                "keep": 2,  # newest ones that are kept; 0: all
            },
        }
    )
