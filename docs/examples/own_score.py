"""A score of your own, in a config file: keep the tokens the model has learned most about in the last steps.

Qin et al. (ssToken, arXiv 2510.18250) call this retrospective excess loss. The reference is a snapshot of the policy.

    rho1 train --config=docs/examples/own_score.py --workdir=runs/retrospective --config.data.train=DATA
"""

import ml_collections

from rho1_jax.configs import default
from rho1_jax.method.token_scores import register


@register
def retrospective(policy_loss_BL, reference_loss_BL):
    """Higher is kept first. The names of the parameters say which signals are needed."""
    return reference_loss_BL - policy_loss_BL


def get_config() -> ml_collections.ConfigDict:
    """SLM with that score, after a tenth of the run on all tokens."""
    config = default.get_config("slm")
    config.selection.update(score="retrospective", dense_fraction=0.1)
    config.reference.update(moves="snapshot", every=100)
    return config
