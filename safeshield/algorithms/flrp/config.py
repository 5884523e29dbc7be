"""Settings of FLRP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from safeshield.files.settings import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Rule,
    Sizes,
    ThreePhases,
)
from safeshield.training.config import PAPER_CRITICS, CriticConfig

Latent = Annotated[
    int,
    Rule(
        "be at least 2 (a coupling flow splits it), or None for the action's own width",
        lambda width: width >= 2,
    ),
]


@dataclass(frozen=True)
class FLRPConfig(CriticConfig):
    """Settings of FLRP. The defaults are the preset "small": two cores, minutes, all tasks.

    "paper" has the settings of tables 4 and 5, for 1,000,000 updates on a GPU. What the paper does
    not say (flows' depth, KL weight, entropy floor) is as in "small"; so are the temperatures'
    units.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (256, 256),
            "flow_hidden": (256, 256),
            "batch_size": 512,
            "learning_rate": 3e-4,
            "polyak": 0.001,
            "safety_weight": 1.0,
            **PAPER_CRITICS,
        },
    }

    flow_hidden: Sizes = (128, 128)
    """Widths of the hidden layers of the flows' coupling networks, the decoder and the experts."""
    latent: Latent | None = None
    """Width of the latent space, at least 2; None: the action's, at least 2."""
    transforms: PositiveInt = 4
    """Coupling layers of each flow."""
    prior: Literal["flow", "gaussian"] = "flow"
    """p(z | s); "gaussian" is N(0, I), the paper's ablation."""
    feasibility: Literal["safety", "cost"] = "safety"
    """What tells feasible from infeasible: Hamilton-Jacobi values, or (the ablation) cost values
    below the 75th percentile of the log's transitions that violate nothing. The shield is always
    made of the safety values."""
    decoder_spread: Positive = 0.1
    """Standard deviation of the decoder's Gaussian, in half widths of the action box."""
    action_temperature: Positive = 0.3
    """T_q of the evidence bound's weight, in standard deviations of h over the log."""
    state_temperature: Positive = 0.5
    """T_v, the same for V_h."""
    kl_weight: NonNegative = 1.0
    """Weight of the divergence of posterior from prior; 1: an evidence bound."""
    shape_weight: NonNegative = 0.1
    """Weight of the prior's shaping, eq. 12."""
    entropy_floor: float = -1.0
    """H0: lowest entropy of the posterior, in nats for each latent entry. (A Gaussian of standard
    deviation 0.09 has it.)"""
    entropy_weight: NonNegative = 1.0
    """lambda_H: weight of what is missing to that floor."""
    reward_temperature: NonNegative = 3.0
    """b_r: how much better actions count for more; in units of one step's advantage."""
    safety_temperature: NonNegative = 5.0
    """b_h: how much more dangerous refined actions are pressed down."""
    refine_steps: NonNegativeInt = 3
    """T: safety, reward, ..., shared. `FLRP.with_refine_steps` changes it after training. Only the
    experts that T calls on are trained: with 1 the shared one, with 2 safety and shared; with 0 the
    third phase is left out and its updates go to the second."""
    reward_weight: NonNegative = 1.0
    """lambda_r of the experts' loss."""
    safety_weight: NonNegative = 10.0
    """lambda_h (the paper: 1, with advantages in units of h)."""
    shared_weight: NonNegative = 0.5
    """lambda_sh."""
    phase_shares: ThreePhases = (0.5, 0.3, 0.2)
    """Shares of the steps for critics, generative model and experts."""
