"""Settings of FLRP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from safeshield.algorithms.gate import GateConfig
from safeshield.files.settings import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Rule,
    Sizes,
    ThreePhases,
)
from safeshield.nn.latent_actor import Order
from safeshield.training.config import PAPER_CRITICS, check_measurable

Latent = Annotated[
    int,
    Rule(
        "be at least 2 (a coupling flow splits it), or None for the action's own width",
        lambda width: width >= 2,
    ),
]


@dataclass(frozen=True)
class FLRPConfig(GateConfig):
    """Settings of FLRP. The defaults, which are the preset "small", are the same for all tasks.

    With the defaults training takes minutes on two cores. The preset "paper" has the settings of
    tables 4 and 5, for 1,000,000 updates on a GPU, in the three phases of section 3.4; algorithm 1
    is `preset("paper", phases="joint")`. The paper has one configuration for all tasks. Settings
    that it does not give are as in "small"; docs/flrp.md lists them.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {},
        "paper": {
            "critic_hidden": (256, 256),
            "flow_hidden": (256, 256),
            "batch_size": 512,
            "learning_rate": 3e-4,
            "polyak": 0.001,
            "safety_discount": 0.99,
            "shape_weight": 1.0,
            "safety_weight": 1.0,
            "candidates": 1,
            **PAPER_CRITICS,
        },
    }
    # Eq. 13 has the weight 1 of ||u||^2, which is here divided by the latent width, that of the
    # task's actions.
    paper_tasks: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            task: {"shape_weight": 2.0}
            for task in (
                *("CarButton1", "CarButton2", "CarPush1", "CarPush2", "CarGoal1", "CarGoal2"),
                *("SwimmerVelocity", "BallRun", "CarRun", "BallCircle", "CarCircle"),
                *("easysparse", "easymean", "easydense"),
                *("mediumsparse", "mediummean", "mediumdense"),
                *("hardsparse", "hardmean", "harddense"),
            )
        },
        **{task: {"shape_weight": 4.0} for task in ("DroneRun", "DroneCircle")},
        "HalfCheetahVelocity": {"shape_weight": 6.0},
        **{task: {"shape_weight": 8.0} for task in ("AntVelocity", "AntRun", "AntCircle")},
    }

    flow_hidden: Sizes = (128, 128)
    """Widths of the hidden layers of the flows' coupling networks, the decoder and the experts.
    Wider layers fit the log more closely and train more slowly."""
    latent: Latent | None = None
    """Width of the latent space, at least 2. A larger width can represent more kinds of behaviour.
    None means the width of the action, but at least 2."""
    transforms: PositiveInt = 4
    """Number of coupling layers in each flow. More layers fit more complex distributions and are
    slower."""
    prior: Literal["flow", "gaussian"] = "flow"
    """The prior p(z | s). "flow" is learned; "gaussian" is N(0, I), the paper's ablation."""
    feasibility: Literal["safety", "cost"] = "safety"
    """Test that separates feasible from infeasible states and actions. "safety" uses the
    Hamilton-Jacobi values. "cost", the paper's ablation, uses cost values, which must not exceed
    their 75th percentile over the logged transitions without a violation; the policy's losses then
    have no `margin`. The shield always uses the safety values."""
    decoder_spread: Positive = 0.1
    """Standard deviation of the decoder's Gaussian, in half widths of the action box. A smaller
    value makes the model reproduce the logged actions more exactly."""
    action_temperature: Positive = 0.3
    """Temperature T_q for Q_h in the weight of the evidence bound, in standard deviations of h over
    the log. A smaller value separates safe from unsafe actions more sharply."""
    state_temperature: Positive = 0.5
    """Temperature T_v for V_h in the weight of the evidence bound, in standard deviations of h over
    the log. A smaller value separates safe from unsafe states more sharply."""
    kl_weight: NonNegative = 1.0
    """Weight of the divergence between posterior and prior. With 1 the loss is an evidence bound. A
    larger weight keeps the posterior closer to the prior; a smaller one reproduces actions more
    exactly."""
    shape_weight: NonNegative = 0.1
    """Weight of the shaping of the prior (eq. 12). A larger weight moves good safe actions closer
    to the middle of the base distribution."""
    entropy_floor: float = -1.0
    """Lowest entropy H0 of the posterior that the loss does not penalise, in nats per latent entry.
    A larger value keeps the posterior wider. A Gaussian of standard deviation 0.09 has the entropy
    of the default."""
    entropy_weight: NonNegative = 1.0
    """Weight lambda_H of the entropy that is missing to `entropy_floor`. A larger weight enforces
    the floor more strictly."""
    reward_temperature: NonNegative = 3.0
    """Temperature b_r: the factor of the reward advantage, in units of one step's advantage, in the
    exponent of the weights of logged actions. A larger value prefers actions of high reward more
    strongly; 0 weighs all feasible actions alike."""
    safety_temperature: NonNegative = 5.0
    """Temperature b_h: the factor of E_h, in units of one step's advantage, in the exponent of the
    weights of the experts' safety loss. A larger value gives dangerous refined actions more weight;
    0 weighs all alike."""
    refine_steps: NonNegativeInt = 3
    """Number T of refinement steps. More steps can move the policy further from the log. The safety
    and the reward expert take turns, and the last step is the shared expert's. Only the experts in
    use are trained: the shared one with T = 1, the safety and the shared one with T = 2. With T = 0
    the third phase is omitted and the second gets its updates. `FLRP.with_refine_steps` changes T
    after training."""
    order: Order = "sequential"
    """Order of the safety and the reward expert, of which the paper's bounds are independent
    (proposition 1). "sequential" (Gauss-Seidel) means in turn, each from the result of the other;
    "jacobi" means both from the same point, with their steps added; "interleaved" means in turn by
    quarters of a step. The shared expert is the last in all of them."""
    trust_region: Positive | None = None
    """Largest length rho of the way from u_0 to u_T in the base space; a longer way is cut. A
    smaller one keeps the policy closer to the log. None means no bound (proposition 1)."""
    reward_weight: NonNegative = 1.0
    """Weight lambda_r of the reward term in the experts' loss. A larger weight keeps refined
    actions closer to logged actions of high reward."""
    safety_weight: NonNegative = 10.0
    """Weight lambda_h of the safety term in the experts' loss. A larger weight puts safety before
    reward (the paper: 1, with advantages in units of h)."""
    shared_weight: NonNegative = 0.5
    """Weight lambda_sh of the term that keeps the refined noise small and close to the original
    noise. A larger weight makes refinement change less."""
    phases: Literal["sequential", "joint"] = "sequential"
    """Order of training. "sequential" trains the critics, then the generative model, then the
    experts (section 3.4 of the paper); "joint" trains all of them in every update, on the batches
    of the critics (its algorithm 1)."""
    phase_shares: ThreePhases = (0.5, 0.3, 0.2)
    """Shares of the updates for critics, generative model and experts, which sum to 1. A phase with
    a larger share trains for longer. Not used when `phases` is "joint"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feasibility == "safety":
            check_measurable(self.margin, self.phases)
