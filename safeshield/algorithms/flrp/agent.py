r"""FLRP: Flow-guided Latent Refiner Policies.

It trains in three phases on one log, or with `phases="joint"` in all of them at once. docs/flrp.md
lists the differences from the paper and their reasons.

1. critics: the safety values V_h, Q_h and the reward values V_r, Q_r, the same as SafeFQL's;
2. generative model: flows p(z | s) and q(z | s, a) and a decoder pi(a | s, z), fitted with a
   safety-weighted evidence bound and shaped so that good safe actions come from the middle of the
   base distribution (eq. 11 to 13);
3. experts: networks for safety, for reward and for both, which refine the base noise while all
   other networks are frozen (eq. 14 to 17).

The agent samples u ~ N(0, I), refines it T times, maps it through the prior flow and takes the mean
of the decoder. It executes this action where it passes the gate of `algorithms.gate`. The module
docstring of `algorithms.flrp.losses` has the losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import torch

from safeshield.algorithms.flrp.config import FLRPConfig
from safeshield.algorithms.flrp.feasibility import cost_units
from safeshield.algorithms.flrp.losses import FLRPRun, LatentArchitecture
from safeshield.algorithms.flrp.shift import BaseShift, ShiftSummary, base_shift
from safeshield.algorithms.gate import GatedAgent
from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import finite_number, whole
from safeshield.nn.latent_actor import LatentPolicy, LatentSpec, expert_order
from safeshield.shield.critics import SafetyModel
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch
from safeshield.spaces.scaling import Scaling
from safeshield.training.architecture import Interface
from safeshield.training.critics import Critics
from safeshield.training.log import LogTensors
from safeshield.training.registry import register
from safeshield.training.state import TrainState
from safeshield.values.reward import COST_NETWORKS, RewardCritics
from safeshield.values.units import SAFETY_NETWORKS

_SHIFT_STATES, _SHIFT_DRAWS = 512, 64


@register("flrp")
class FLRP(GatedAgent[FLRPConfig, LatentArchitecture]):
    """Learn a generative model of the log's actions and refine its noise for safety and reward.

    Args:
        config: Settings; see `FLRPConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> import numpy as np
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = FLRP(FLRPConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> agent.predict(np.zeros((3, 2), np.float32), deterministic=True)[0].shape
    (3, 2)
    >>> agent.base_shift(np.zeros((3, 2), np.float32)).divergence.shape
    (3,)
    """

    config_type = FLRPConfig
    file_format = "safeshield-flrp"
    run_type = FLRPRun
    _dropped = ("flow_steps",)
    _before: ClassVar[dict[str, Any]] = {
        **GatedAgent._before,
        "candidates": 1,
        "last_resort": "lowest",
        "order": "sequential",
        "trust_region": None,
        "phases": "sequential",
    }
    _fewest_steps = 3
    _same_actor = False

    def with_refine_steps(self, refine_steps: int) -> Self:
        """Return an agent with the same weights that makes `refine_steps` refinement steps (T).

        With T = 0 nothing is refined.

        Raises:
            ValueError: T is not a whole number of at least 0, or it uses an expert that the T of
                training did not use, so that this expert has not been trained.
        """
        other = self._changed(refine_steps=refine_steps)
        trained = None if self._model is None else self._model.trained_steps
        if trained is not None:
            untrained = set(expert_order(other.config.refine_steps)) - set(expert_order(trained))
            if untrained:
                raise ValueError(
                    f"refine_steps={refine_steps} needs {sorted(untrained)}, which training with "
                    f"refine_steps={trained} has left out: train with refine_steps of at least "
                    f"{min(other.config.refine_steps, 3)}"
                )
        if other._model is not None:
            policy = other._model.policy
            spec = dataclasses.replace(policy.spec, refine_steps=other.config.refine_steps)
            # The shift in the file was measured with the T of training.
            model = dataclasses.replace(
                other._model, policy=dataclasses.replace(policy, spec=spec), shift=None
            )
            other._adopt(model, other._networks)
            other._memory = self._memory
        return other

    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) whose fallback is this agent's policy.

        Its support test can use the density of that policy: `with_support(log, score="density")`.
        """
        return Shield(
            self._safety(self._fitted()),
            trained_by=f"FLRP, seed {self.config.seed}",
            training_episodes=self._episodes,
        )

    def base_shift(self, observations: Batch, draws: int = 256) -> BaseShift:
        """Estimate how far refinement moves the policy in given states (eq. 18 to 20).

        Args:
            observations: n observations, or one.
            draws: Number of samples of u_0, which are the same in each state; at least 2.

        Returns:
            The divergence D between the refined and the unrefined base distribution, (n,) in nats,
            its standard error (n,), and the share of samples (n,) at which the map folds, so that D
            is a lower bound only. The property `total_variation` bounds by how much refinement
            raises the probability of any set of actions. See `algorithms.flrp.shift`.

        Raises:
            TypeError: `draws` is not a whole number.
            ValueError: `draws` is below 2; or an observation has another shape, or is not finite.
        """
        model, draws = self._fitted(), whole("draws", draws, least=2)
        rows, _ = self._rows(model, observations, "observations")
        seen = torch.tensor(model.scaling.observations(rows), device=self.device)
        return self._shift(model, seen, draws)

    def _shift(self, model: LatentArchitecture, seen: torch.Tensor, draws: int) -> BaseShift:
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(draws, model.policy.spec.latent, generator=generator).to(self.device)
        return base_shift(model.policy, self._networks, seen, noise)

    @property
    def shift_summary(self) -> ShiftSummary | None:
        """Summary of the shift over states of the log; None after `with_refine_steps`."""
        return self._fitted().shift

    def diagnostics(self) -> dict[str, Any]:
        """Return what `GatedAgent.diagnostics` returns, and how much refinement changes the policy.

        The change is that in states of the log, as numbers and as a sentence.
        """
        shift, trained = self.shift_summary, self._fitted().trained_steps
        gate = super().diagnostics()
        if shift is None:
            known = "another T" if trained is None else f"T = {trained}"
            return {
                **gate,
                "refinement": f"refines {self.config.refine_steps} times, but how far that moves "
                f"the policy over the log was measured for {known} only: base_shift(observations) "
                "estimates it in states of your choice",
            }
        return {**gate, "base_shift": shift.to_json(), "refinement": shift.bound}

    # -- methods that OfflineAgent requires ---------------------------------------------------

    def _units(self, dataset: OfflineDataset, scaling: Scaling) -> dict[str, Any]:
        units = super()._units(dataset, scaling)
        if self.config.feasibility == "safety":
            return units
        return {**units, "cost_scale": cost_units(dataset, self.config.discount)}

    def _build(self, interface: Interface, units: dict[str, Any]) -> LatentArchitecture:
        model = super()._build(interface, units)
        if self.config.feasibility == "safety":
            return model
        offset, spread = (finite_number(x, "cost_scale") for x in units["cost_scale"])
        costs = RewardCritics(
            *interface.scaling.widths,
            self.config.critic_hidden,
            offset,
            spread,
            names=COST_NETWORKS,
        )
        return dataclasses.replace(model, costs=costs)

    def _restore(self, interface: Interface, header: dict[str, Any]) -> LatentArchitecture:
        model = super()._restore(interface, header)
        shift = header["shift"]
        # Older files lack this entry. Where they have a summary, T is that of training.
        trained = header.get(
            "trained_refine_steps", None if shift is None else self.config.refine_steps
        )
        if trained is not None:
            trained = whole("trained_refine_steps", trained, least=0)
        return dataclasses.replace(
            model,
            shift=None if shift is None else ShiftSummary.from_json(shift),
            trained_steps=trained,
        )

    def _architecture(self, interface: Interface, critics: Critics) -> LatentArchitecture:
        config = self.config
        spec = LatentSpec(
            config.latent or max(2, interface.scaling.action_features),
            config.flow_hidden,
            config.transforms,
            config.prior,
            config.decoder_spread,
            config.refine_steps,
            config.order,
            config.trust_region,
        )
        policy = LatentPolicy(*interface.scaling.widths, spec)
        return LatentArchitecture(*interface, {}, critics, policy)

    def _noise_features(self, model: LatentArchitecture) -> int:
        return model.policy.spec.latent

    def _settle(
        self, model: LatentArchitecture, log: LogTensors, state: TrainState
    ) -> LatentArchitecture:
        model = super()._settle(model, log, state)
        rows = torch.linspace(0, len(log) - 1, min(_SHIFT_STATES, len(log))).long()
        shift = self._shift(model, log.observations[rows.to(self.device)], _SHIFT_DRAWS)
        summary = ShiftSummary.of(shift, _SHIFT_DRAWS)
        return dataclasses.replace(model, shift=summary, trained_steps=self.config.refine_steps)

    def _judge(self, model: LatentArchitecture) -> SafetyModel:
        names = (*SAFETY_NETWORKS, *model.policy.parts())
        return SafetyModel(
            *model.interface,
            model.critics.safety.scale,
            {name: self._arrays[name] for name in names},
            fallback_actor=model.policy,
            behaviour_actor=model.policy.unrefined,
        )

    def _draw(
        self,
        model: LatentArchitecture,
        networks: Any,  # noqa: ANN401 - arrays or tensors
        observations: Any,  # noqa: ANN401
        noise: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return the actions for given u_0, after refinement."""
        return model.policy.act(networks, observations, noise)

    def _further(
        self,
        model: LatentArchitecture,
        networks: Any,  # noqa: ANN401 - arrays or tensors
        observations: Any,  # noqa: ANN401
        noise: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return the actions for given u_0 without refinement."""
        return model.policy.unrefined.act(networks, observations, noise)
