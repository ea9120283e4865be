"""Every key of a training run, with its default and its meaning. All other configs start from this one.

    rho1 train --config=default:slm --workdir=DIR --config.data.train=DATA [--config.key=value]

This file is the only place that declares a key: the typed sections that the code works with, the ConfigDict that the
command line changes, and the reference page of the documentation all derive from it. A new key's default must be what
the code did before the key existed, because that is the value older checkpoints get.
"""

import dataclasses
from typing import Annotated, Any, Literal, get_type_hints

import ml_collections
from ml_collections import config_dict
from pydantic import Field, FiniteFloat

from rho1_jax.runtime.errors import UserError

# The stages of the method, and the score each one selects by.
STAGES = {
    "reference": "none",
    "clm": "none",
    "random": "random",
    "slm": "excess",
    # With a reference trained on the corpus itself (section 3.4 of the paper).
    "self_reference": "none",
    "self_loss": "reference_loss",
    "self_entropy": "reference_entropy",
    "self_both": "reference_loss & reference_entropy",
}


# Ranges of the keys' values. `rho1_jax.training.config.check_values` refuses anything else.
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]  # JAX counts in int32
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ExitStatus = Annotated[int, Field(ge=0, lt=256)]
Period = Annotated[int, Field(ge=0, le=1024)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
NonNegativeFloat = Annotated[FiniteFloat, Field(ge=0)]
PositiveOrInfinite = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
BackwardChoice = Literal["largest", "drawn", "selected"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    data: int = -1  # copies of the model; -1: every device the other two axes leave
    fsdp: int = 1  # devices that share parameters, gradients and optimizer state
    tensor: int = 1  # devices that share heads, feed-forward width and vocabulary


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the model, and how it is computed."""

    family: str = "llama"  # structure: a name in rho1_jax/models/families
    vocab_size: NonNegativeInt = 0  # V, number of token ids; 0: the tokenizer's
    width: PositiveInt = 256  # D, width of the hidden states
    layers: PositiveInt = 6  # N, number of layers
    heads: PositiveInt = 8  # H, query heads
    kv_heads: PositiveInt = 4  # K, key/value heads; divides `heads`
    head_width: PositiveInt = 32  # C, width of a head
    ff_width: PositiveInt = 768  # F, width of the feed-forward
    context_length: NonNegativeInt = 0  # longest row the model is built for; 0: the data's
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary frequencies
    rope_factor: PositiveFloat = 1.0  # stretches the slow rotary waves, as Llama 3.1 does with 8; 1: no stretching
    rope_scaling: Literal["llama3", "linear", "long"] = "llama3"  # stretches slow waves, all alike, or by lists
    rope_low_frequency_factor: PositiveFloat = 1.0  # turns in the original length below which a wave is fully stretched
    rope_high_frequency_factor: PositiveFloat = 4.0  # turns above which a wave is left alone
    rope_original_length: PositiveInt = 8192  # context length before the stretching
    rope_short_factors: tuple[PositiveFloat, ...] = ()  # "long": stretches each wave in rows up to the original length
    rope_long_factors: tuple[PositiveFloat, ...] = ()  # "long": stretches each wave in longer rows
    rope_attention_factor: PositiveFloat = 1.0  # "long": scales the rotated part of queries and keys
    rope_fraction: PositiveFraction = 1.0  # share of each head that rotates (gpt_neox, phi3)
    norm_eps: PositiveFloat = 1e-5  # epsilon of the norms
    tied_embeddings: bool = True  # one matrix for input and output
    sliding_window: PositiveInt | None = None  # keys a query sees, itself included; None: all of them
    # For the families that read them. None or 0: the family's own value.
    global_every: Period = 0  # one layer in this many has no sliding window (Gemma)
    rope_local_theta: PositiveFloat | None = None  # base of the rotary frequencies in layers with a window (Gemma 3)
    no_rope_every: Period = 0  # one layer in this many has no rotary positions (SmolLM3)
    attention_soft_cap: NonNegativeFloat | None = None  # soft cap on the attention logits; 0: no cap (Gemma 2)
    logit_soft_cap: NonNegativeFloat | None = None  # soft cap on the output logits; 0: no cap (Gemma)
    parallel_residual: bool = True  # attention and feed-forward both read the layer's input (gpt_neox)
    gelu_tanh: bool = False  # the tanh approximation of GELU instead of GELU (gpt_neox)
    embedding_scale: PositiveFloat = 1.0  # factor on the input embeddings (granite)
    residual_scale: PositiveFloat = 1.0  # factor on what each layer adds to the hidden states (granite)
    query_scale: PositiveFloat | None = None  # factor on queries; None: 1 / sqrt(head_width) (granite, Gemma)
    logit_divisor: PositiveFloat = 1.0  # divides the output logits (granite)
    compute_dtype: Dtype = "float32"  # dtype of activations and of the reference; "bfloat16" on TPU and GPU
    attention: str = "auto"  # kernel: "xla", "splash" (TPU), "cudnn" (GPU); "auto": by device, dtype and shape
    remat: str = "none"  # recomputed in the backward pass to save memory: "dots" (all but products) or "full"
    unroll: PositiveInt = 1  # layers compiled as one piece of the loop over them; more is faster on CPU
    loss_chunk: PositiveInt = 512  # tokens per device whose logits are computed at the same time
    logits_gib: NonNegativeFloat = 0.0  # GiB per device: keeps all logits for the backward pass if they fit in this

    def __post_init__(self) -> None:
        for key in ("rope_short_factors", "rope_long_factors"):  # lists, if they come from JSON
            object.__setattr__(self, key, tuple(getattr(self, key)))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the run trains on."""

    train: str = ""  # prepared data sets: DIR, or a mixture by weight DIR1:3,DIR2:1
    external: str = ""  # columns of your own, [rows, seq_len] per data set: FILE.npy,... or NAME=FILE.npy,...
    document_mask: bool = True  # attention stays within a document, and positions restart at each
    prefetch: NonNegativeInt = 4  # batches read ahead; 0: none


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate schedule."""

    learning_rate: NonNegativeFloat = 1e-3  # peak learning rate
    schedule_steps: NonNegativeInt = 0  # steps that the learning rate schedule spans; 0: all steps of the run
    warmup_fraction: FractionBelowOne = 0.1  # share of the schedule that warms up, linearly from zero
    decay: str = "cosine"  # shape of the decay after the warm-up: "cosine" or "linear"
    final_learning_rate_fraction: Fraction = 0.1  # learning rate at the end of the schedule, relative to the peak
    b1: FractionBelowOne = 0.9  # decay of the first moment
    b2: FractionBelowOne = 0.95  # decay of the second moment
    eps: PositiveFloat = 1e-8  # added to the denominator of the update
    weight_decay: NonNegativeFloat = 0.1  # weight decay of matrices; norms and biases have none
    clip_norm: PositiveOrInfinite = 1.0  # largest global norm of the gradient
    first_moment_dtype: Dtype = "float32"  # dtype of the first moment; "bfloat16" saves memory
    host_offload: bool = False  # keeps the moments in host memory between updates, where the backend can


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Which tokens are trained on, and with which weight."""

    score: str = "excess"  # "none" (CLM), a score in rho1_jax/method/token_scores.py, "a:0.7 & b:0.7" or "a | b"
    rule: str = "ratio"  # keeps the top `ratio`; "threshold", "soft" and "weight": see the guide on selection
    ratio: FiniteFloat = 0.6  # share of the eligible tokens to train on, a multiple of 0.0001
    schedule: str = "constant"  # or from first_ratio to ratio: "linear", "cosine" or "stepwise"
    first_ratio: FiniteFloat = 1.0  # ratio at the start of the schedule
    stairs: int = 4  # number of levels of the schedule "stepwise"
    dense_fraction: FractionBelowOne = 0.0  # share of the steps, at the start, that train on every eligible token
    threshold: FiniteFloat = 0.0  # score threshold of the rules "threshold" and "soft"
    temperature: PositiveFloat = 1.0  # temperature of the rule "soft", in units of the score
    scope: str = "global"  # which tokens compete: those of the step, of a "microbatch" or of a "sequence"


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Which tokens the backward pass of a layer goes through. Below 1.0, the gradient is an approximation."""

    tokens: PositiveFraction = 1.0  # share of a device's tokens; 1.0: the exact gradient
    choice: BackwardChoice = "largest"  # cotangents, "drawn" by their norms, or the largest of "selected" tokens


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from."""

    checkpoint: str = ""  # a run, one of its checkpoints, or a Hugging Face folder; empty: random weights


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The model that scores refer to."""

    checkpoint: str = ""  # a run, one of its checkpoints, or a Hugging Face folder
    scores: str = ""  # name of losses stored beside the data by `rho1 score`; empty: the reference runs in the step
    moves: str = ""  # lets the reference follow the policy: "average" of its parameters, or "snapshot"
    decay: FractionBelowOne = 0.999  # share of the average that a step keeps, for moves="average"
    every: PositiveInt = 100  # steps between two snapshots, for moves="snapshot"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated during the run."""

    every: PositiveInt = 100  # steps between two evaluations; the last step always has one
    data: str = ""  # held-out loss on the split "eval" of data sets: NAME=DIR,NAME=DIR
    rows: PositiveInt = 256  # rows of each data set, rounded up to whole batches
    tasks: str = ""  # accuracy on math tasks, comma-separated: gsm8k,math_oai,... of rho1_jax/evals/tasks.py
    data_dir: str = ""  # folder of the tasks' files: DATA_DIR/gsm8k/test.jsonl
    task_items: NonNegativeInt = 0  # items of each task, from its start; 0: all
    exemplars: str = ""  # NAME=FILE,NAME=FILE of {"question", "solution"} lines that replace a task's own
    tool_use: bool = False  # asks tasks in transcript form, without exemplars, and runs the model's programs
    questions: str = ""  # accuracy on JSON lines files: NAME=FILE,NAME=FILE
    prompt_template: str = "{question}\n"  # turns a question's record into a prompt
    answer_key: str = "answer"  # the record's key that holds the right answer
    answer_pattern: str = r"####\s*(.+)"  # regular expression; the group of its last match is the answer
    stops: tuple[str, ...] = ("\n\n",)  # strings that end a generation
    max_new_tokens: PositiveInt = 256  # longest generation
    generate_batch: PositiveInt = 64  # prompts decoded together


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """Profiling."""

    first: NonNegativeInt = 0  # first step recorded for xprof, in WORKDIR/trace; 0: no trace
    last: NonNegativeInt = 0  # last step recorded


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: PositiveInt = 100  # steps between two checkpoints; the last step always has one
    keep: NonNegativeInt = 2  # newest checkpoints to keep; 0: all
    keep_every: NonNegativeInt = 0  # also keeps the checkpoint of every K-th step; 0: none
    best: str = ""  # also keeps the checkpoint with the best eval/NAME/loss or eval/NAME/accuracy; "": none
    patience: NonNegativeInt = 0  # evaluations without a better `best` after which the run ends; 0: never
    grace_seconds: PositiveFloat = 30.0  # time to finish a step and write a checkpoint after SIGTERM or SIGINT
    stop_status: ExitStatus = 0  # exit status after such a stop; above 0 where only what fails is started again


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run."""

    seed: Seed = 0  # seed of the initial weights, the shuffles and the random score
    steps: PositiveInt = 1000  # updates in total
    epochs: NonNegativeFloat = 0.0  # passes over the training data; above 0, they decide `steps`
    batch_size: PositiveInt = 32  # rows per step, over all devices and microbatches
    microbatches: PositiveInt = 1  # parts that a step is computed in, to save memory; the update stays the same
    log_every: PositiveInt = 10  # steps between two lines of metrics.jsonl
    max_skipped_steps: PositiveInt = 10  # stops after this many steps in a row whose loss or gradient is not finite
    objective: str = "cross_entropy"  # what is minimized: a name in rho1_jax/method/objectives.py
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    selection: SelectionConfig = SelectionConfig()
    backward: BackwardConfig = BackwardConfig()
    init: InitConfig = InitConfig()
    reference: ReferenceConfig = ReferenceConfig()
    eval: EvalConfig = EvalConfig()
    trace: TraceConfig = TraceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def _config_dict(section: Any) -> ml_collections.ConfigDict:
    """A section, and those in it, as a ConfigDict whose keys take only values of their type."""
    types = get_type_hints(type(section))
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif types[field.name] == int | None:
            value = config_dict.placeholder(int)
        config[field.name] = value
    return config


def get_config(stage: str = "slm") -> ml_collections.ConfigDict:
    """The defaults of a stage, one of STAGES."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; this config has the stages {', '.join(STAGES)}")
    config = _config_dict(RunConfig())
    config.selection.score = STAGES[stage]
    return config
