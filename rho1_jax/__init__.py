"""Selective Language Modeling (Rho-1, arXiv 2404.07965) in JAX: the functions to call from a notebook or a program.

    import rho1_jax
    from rho1_jax.configs import default

    config = default.get_config("clm")
    config.data.train = "data/web"
    rho1_jax.train_model(config, "runs/clm")

Each function is imported when it is first used: `import rho1_jax` alone does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rho1_jax.evaluate import evaluate_model
    from rho1_jax.generate import generate_text
    from rho1_jax.method.token_scores import register as register_score
    from rho1_jax.score import score_data
    from rho1_jax.train import train_model

__version__ = "0.2.0"
__all__ = ["__version__", "evaluate_model", "generate_text", "register_score", "score_data", "train_model"]

# Public name -> module and the function's name there.
_PUBLIC = {
    "train_model": ("rho1_jax.train", "train_model"),
    "evaluate_model": ("rho1_jax.evaluate", "evaluate_model"),
    "score_data": ("rho1_jax.score", "score_data"),
    "generate_text": ("rho1_jax.generate", "generate_text"),
    "register_score": ("rho1_jax.method.token_scores", "register"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = _PUBLIC[name]
    return getattr(importlib.import_module(module), function)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
