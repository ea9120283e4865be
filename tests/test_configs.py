"""Every config loads in every stage with exactly the default's keys; recipes hold the paper's figures."""

import importlib
import pathlib
import re

import pytest

from rho1_jax.configs import default, finetune_tora, llama3_8b_math, llama3_70b_math, models
from rho1_jax.models.decoder import param_count
from rho1_jax.runtime.errors import UserError
from rho1_jax.training.config import check_values, model_config

SHARED = ("__init__.py", "models.py", "recipe.py", "finetune_tora.py")
FILES = sorted(path for path in pathlib.Path(default.__file__).parent.glob("*.py") if path.name not in SHARED)


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


@pytest.mark.parametrize("stage", default.STAGES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_stage_sets_the_score_and_adds_no_key(file, stage):
    config = importlib.import_module(f"rho1_jax.configs.{file.stem}").get_config(stage)
    assert config.selection.score == default.STAGES[stage]
    assert set(keys(config)) == set(keys(default.get_config()))


@pytest.mark.parametrize("stage, score", [("sft", "none"), ("slm", "excess"), ("sft_7b", "none"), ("slm_7b", "excess")])
def test_fine_tuning_has_its_own_stages(stage, score):
    config = finetune_tora.get_config(stage)
    assert config.selection.score == score
    assert set(keys(config)) == set(keys(default.get_config()))
    with pytest.raises(UserError, match="unknown stage 'clm'; this config has the stages sft, slm, sft_7b, slm_7b"):
        finetune_tora.get_config("clm")


@pytest.mark.parametrize("recipe", ["tinyllama_math", "llama3_8b_math", "llama3_70b_math", "gemma3_4b_math"])
def test_each_stage_refers_to_the_right_reference(recipe):
    get_config = importlib.import_module(f"rho1_jax.configs.{recipe}").get_config
    assert get_config("slm").reference.checkpoint == f"runs/{recipe}/reference"
    for stage in ("self_loss", "self_entropy", "self_both"):
        assert get_config(stage).reference.checkpoint == f"runs/{recipe}/self_reference"
    assert get_config("self_reference").data.train == get_config("clm").data.train


def test_weak_to_strong_refers_to_a_smaller_model_with_the_same_tokenizer():
    config = llama3_70b_math.get_config("weak_to_strong")
    weak = llama3_8b_math.get_config("reference")
    assert config.reference.checkpoint == llama3_8b_math.get_config("slm").reference.checkpoint
    assert config.selection.score == "excess" and config.model.vocab_size == weak.model.vocab_size
    assert config.model.layers > weak.model.layers


# Parameter counts, as published with the models.
COUNTS = {
    "TINYLLAMA_1B": 1_100_048_384,
    "MISTRAL_7B": 7_241_732_096,
    "LLAMA3_8B": 8_030_261_248,
    "LLAMA3_70B": 70_553_706_496,
    "GEMMA3_4B": 3_880_263_168,  # the text model
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_model_has_the_published_number_of_parameters(name):
    config = default.get_config()
    config.model.update(getattr(models, name))
    assert param_count(model_config(config)) == COUNTS[name]


@pytest.mark.parametrize(
    "recipe, tokens, reference_tokens, seq_len, learning_rate, reference_learning_rate, ratio",
    [
        ("tinyllama_math", 15e9, 1.5e9, 2048, 8e-5, 5e-5, 0.6),
        ("mistral_7b_math", 15e9, 1.5e9, 4096, 2e-5, 1e-5, 0.7),
        ("tinyllama_general", 80e9, 5.7e9, 2048, 1e-4, 5e-5, 0.6),
    ],
)
def test_recipes_have_the_papers_figures(
    recipe, tokens, reference_tokens, seq_len, learning_rate, reference_learning_rate, ratio
):
    get_config = importlib.import_module(f"rho1_jax.configs.{recipe}").get_config
    for stage, rate, total in (
        ("slm", learning_rate, tokens),
        ("clm", learning_rate, tokens),
        ("random", learning_rate, tokens),
        ("reference", reference_learning_rate, reference_tokens),
    ):
        config = get_config(stage)
        assert config.batch_size * seq_len == 2**20
        assert total - 2**20 < config.steps * 2**20 <= total
        assert config.optimizer.learning_rate == rate and config.optimizer.decay == "cosine"
        assert config.selection.ratio == ratio


def test_every_key_has_a_comment():
    keys_with_comment = 0
    for line in pathlib.Path(default.__file__).read_text().splitlines():
        if re.match(r"    \w+: [^=]+ = ", line) and "Config()" not in line:
            assert "  # " in line, line
            keys_with_comment += 1
    assert keys_with_comment == len(list(keys(default.get_config())))


def test_an_unknown_stage_is_refused():
    with pytest.raises(UserError, match="unknown stage 'dpo'"):
        default.get_config("dpo")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("optimizer.b1", 1.5, "1.5: input should be less than 1"),
        ("optimizer.b2", -0.1, "-0.1: input should be greater than or equal to 0"),
        ("optimizer.eps", 0.0, "0.0: input should be greater than 0"),
        ("optimizer.learning_rate", float("nan"), "nan: input should be a finite number"),
        ("optimizer.learning_rate", -1e-3, "-0.001: input should be greater than or equal to 0"),
        ("optimizer.weight_decay", float("inf"), "inf: input should be a finite number"),
        ("optimizer.clip_norm", float("nan"), "nan: input should be greater than 0"),
        ("optimizer.clip_norm", 0.0, "0.0: input should be greater than 0"),
        ("optimizer.warmup_fraction", 1.0, "1.0: input should be less than 1"),
        ("optimizer.final_learning_rate_fraction", 2.0, "2.0: input should be less than or equal to 1"),
        ("optimizer.first_moment_dtype", "float8", "'float8': input should be 'float32', 'bfloat16' or 'float16'"),
        ("model.compute_dtype", "int8", "'int8': input should be 'float32', 'bfloat16' or 'float16'"),
        *(
            (f"model.{name}", 0, "0: input should be greater than or equal to 1")
            for name in ("layers", "heads", "width")
        ),
        ("model.kv_heads", 0, "0: input should be greater than or equal to 1"),
        ("model.vocab_size", -1, "-1: input should be greater than or equal to 0"),
        ("model.ff_width", 10**12, "1000000000000: input should be less than 2147483648"),
        ("model.norm_eps", float("nan"), "nan: input should be a finite number"),
        ("model.rope_low_frequency_factor", 4.0, "4.0 must be below config.model.rope_high_frequency_factor=4.0"),
        ("model.sliding_window", 0, "0: input should be greater than or equal to 1"),
        ("selection.temperature", float("nan"), "nan: input should be a finite number"),
        ("selection.threshold", float("nan"), "nan: input should be a finite number"),
        ("selection.dense_fraction", float("nan"), "nan: input should be"),
        ("reference.decay", float("nan"), "nan: input should be"),
        ("selection.ratio", float("inf"), "inf: input should be a finite number"),
        ("selection.first_ratio", float("nan"), "nan: input should be a finite number"),
        ("eval.stops", (3,), "3: input should be a valid string"),
        ("eval.rows", -3, "-3: input should be greater than or equal to 1"),
        ("checkpoint.keep", -1, "-1: input should be greater than or equal to 0"),
        ("seed", -1, "-1: input should be greater than or equal to 0"),
        ("seed", 2**32, "4294967296: input should be less than 4294967296"),
        ("epochs", float("nan"), "nan: input should be a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(key, value, message):
    config = default.get_config()
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=rf"^config\.{re.escape(key)}(\.0)?={re.escape(message)}"):
        check_values(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_values_of_every_config_are_allowed(file):
    for stage in default.STAGES:
        check_values(importlib.import_module(f"rho1_jax.configs.{file.stem}").get_config(stage))


def test_clipping_and_reading_ahead_can_be_switched_off():
    config = default.get_config()
    config.optimizer.clip_norm, config.data.prefetch = float("inf"), 0
    check_values(config)
