r"""SafeFQL: Safe Flow Q-Learning (arXiv 2603.15136; RLC 2026), whole.

Three phases on one log, each its own update (page and official code compared in docs/safefql.md):

1. critics: safety values V_h, Q_h (`values.safety`) and reward values V_r, Q_r (`values.reward`);
2. teacher: flow matching, the log's own behaviour (`nn.flow`);
3. student: a one-step actor mu(s, z), z ~ N(0, I), that minimises

       distillation * || mu(s, z) - teacher(s, z) ||^2
       + mean over { Q_h(s, mu) < -margin } of  - A_r(s, mu)
       + safety_weight * mean over the others of  max(Q_h(s, mu) + margin, 0) / sigma_h

The two branches stand in units of one step's advantage, reward's (A_r = min_i (Q_r,i - V_r) /
sigma_r) and safety's (sigma_h), and each is averaged over its own samples: so one setting serves
tasks whose official configurations needed weights from 0.1 to 100,000.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.algorithms.safefql_updates import STUDENT, TEACHER, Architecture, SafeFQLRun
from safeshield.algorithms.tensors import (
    LogTensors,
    check_boundary,
    fingerprint,
    return_scale,
    safety_scale,
)
from safeshield.algorithms.training import FitOptions, run_phases
from safeshield.data.dataset import OfflineDataset
from safeshield.files import read_tensors, write_tensors
from safeshield.flat import Batch, flat_actions, flat_observations
from safeshield.nn.forward import forward
from safeshield.nn.mlp import Networks
from safeshield.scaling import BEHAVIOUR, SAFETY_NETWORKS, SafetyScale, Scaling, finite_number
from safeshield.shield.model import SafetyModel
from safeshield.shield.shield import Shield
from safeshield.spaces import space_from_json, space_to_json
from safeshield.values.reward import RewardCritics
from safeshield.values.safety import SafetyCritics

_FORMAT = "safeshield-safefql"
_VERSION = 1


def _box(space: gym.Space[Any]) -> gym.spaces.Box:
    if not isinstance(space, gym.spaces.Box):
        raise TypeError(
            f"SafeFQL's actor needs a Box of actions, got {space!r}; ShieldTrainer makes a shield "
            "for discrete ones"
        )
    return space


@dataclass(frozen=True)
class SafeFQLConfig:
    """Settings of SafeFQL. The defaults are one setting for all tasks."""

    seed: int = 0
    """Seed of weights, batches and noise."""
    critic_hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of the critics' hidden layers. Depth pays: on the boat three of 128 erred less than
    two of 256 (the papers'), at half the cost."""
    flow_hidden: tuple[int, ...] = (256, 256)
    """Widths of the teacher's hidden layers (official code: four of 512)."""
    student_hidden: tuple[int, ...] = (128, 128, 128)
    """Widths of the student's hidden layers (official code: four of 512)."""
    batch_size: int = 256
    """Transitions in an update."""
    learning_rate: float = 1e-3
    """Adam's rate at the start of a phase; it falls to a fiftieth by its end."""
    discount: float = 0.99
    """Discount of rewards, per step."""
    safety_discount: float | None = None
    """Discount g of the safety backup, per step. A violation k steps ahead weighs g^k: choose
    1 - g well below (time step) / (time it takes to get out of danger). None: 0.997 where labels
    are continuous; 0.99 where they are binary, because there it sets how far ahead a violation is
    felt (`data.label_reach`)."""
    reward_expectile: float = 0.95
    """Weight on the better actions in V_r."""
    safety_expectile: float = 0.99
    """Weight on the safer actions in V_h (papers: 0.9)."""
    safety_backup_steps: tuple[int, ...] = (64, 32, 16, 8)
    """Steps along the log in the targets of V_h, in equal parts of the critics' phase. End on 1
    (the papers' form) where the environment is strongly random; see `values.safety`."""
    reward_backup_steps: tuple[int, ...] = (64, 16, 8, 8)
    """The same for V_r."""
    safe_reward_value: bool = True
    """Value states by the best SAFE way on (`values.reward`); the papers' critics by any."""
    polyak: float = 0.005
    """Share by which the slow copies move towards the critics at each update."""
    near_share: float = 0.5
    """Share of each batch drawn from the eighth of the log that lies nearest to V_h = 0."""
    flow_steps: int = 10
    """Euler steps of the teacher."""
    distillation: float = 0.1
    """Weight of the student's distance to the teacher."""
    margin_steps: float = 8.0
    """Margin of the student's gate, in units of sigma_h (one step's worth of h): a gate
    thinner than one step's motion is never seen by the student."""
    safety_weight: float = 1.0
    """Weight of the student's unsafe branch."""
    phases: Literal["sequential", "joint"] = "sequential"
    """Critics, then teacher, then student; or all three in every step, as the official code."""
    phase_shares: tuple[float, float, float] = (0.5, 0.15, 0.35)
    """Shares of the steps for the three phases; ignored by "joint"."""

    def __post_init__(self) -> None:
        positive = ("batch_size", "learning_rate", "flow_steps", "safety_weight")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("discount", "safety_discount", "reward_expectile", "safety_expectile"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("near_share", "polyak"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("distillation", "margin_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.phases not in ("sequential", "joint"):
            raise ValueError(f"phases must be 'sequential' or 'joint', got {self.phases!r}")
        shares = self.phase_shares
        if len(shares) != 3 or not min(shares) > 0 or not abs(sum(shares) - 1) <= 1e-9:
            raise ValueError(
                f"phase_shares must be three numbers above 0 that sum to 1, got {shares}"
            )
        for name in ("batch_size", "flow_steps"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an integer, got {getattr(self, name)!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        for name in ("critic_hidden", "flow_hidden", "student_hidden"):
            widths = getattr(self, name)
            if not isinstance(widths, tuple) or not widths or min(widths) < 1:
                raise ValueError(f"{name} must be a tuple of widths of 1 or more, got {widths!r}")
        for name in ("safety_backup_steps", "reward_backup_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, tuple) or not steps or min(steps) < 1:
                raise ValueError(f"{name} must be a tuple of counts of 1 or more, got {steps!r}")

    def discount_of(self, kind: Literal["continuous", "binary"]) -> float:
        """Return the discount of the safety backup for this kind of labels."""
        if self.safety_discount is not None:
            return self.safety_discount
        return 0.997 if kind == "continuous" else 0.99

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild a configuration from `dataclasses.asdict` after a round trip through JSON.

        Raises:
            TypeError: an unknown field.
            ValueError: a value out of range.
        """
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)


class SafeFQL:
    """Offline safe actor and safety critics from one log.

    Args:
        config: settings; see `SafeFQLConfig`.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or a `torch.device`.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.data import collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,), seed=1))
    >>> agent = agent.fit(log, steps=30)
    >>> action, _ = agent.predict(np.zeros(2, np.float32), deterministic=True)
    >>> action.shape, agent.shield().delta
    ((2,), 0.0)
    """

    def __init__(
        self, config: SafeFQLConfig | None = None, *, device: str | torch.device = "auto"
    ) -> None:
        self.config = config or SafeFQLConfig()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._model: Architecture | None = None
        self._networks: Networks = {}
        self._arrays: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
        self._noise = np.random.default_rng(self.config.seed)

    # -- training -----------------------------------------------------------------------------

    def fit(
        self,
        dataset: OfflineDataset,
        steps: int = 100_000,
        *,
        progress_bar: bool = False,
        log_dir: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 2000,
        stop_after: int | None = None,
    ) -> Self:
        """Train on a log; returns self.

        Args:
            dataset: whole episodes with labels.
            steps: updates in all, shared among the phases.
            progress_bar: show one.
            log_dir: folder for TensorBoard files.
            checkpoint: file from which to go on where it exists, and which is kept up to date. A
                resumed run ends with the same weights as one that was never interrupted.
            checkpoint_every: updates between two checkpoints.
            stop_after: updates after which to stop early, for runs in instalments; needs
                `checkpoint`.

        Raises:
            TypeError: actions are discrete: its actor is continuous; `ShieldTrainer` takes them.
            ValueError: the log has no violation or nothing but violations, its action box is
                unbounded, or the checkpoint belongs to another run.
            FloatingPointError: a loss became NaN.
        """
        if steps < 3:
            raise ValueError(f"steps must be at least 3, one for each phase, got {steps}")
        if stop_after is not None and checkpoint is None:
            raise ValueError("stop_after needs a checkpoint file to stop into")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        if checkpoint is not None and not Path(checkpoint).parent.is_dir():
            raise FileNotFoundError(f"make the folder of the checkpoint {checkpoint} first")
        check_boundary(dataset)
        model = self._describe(dataset)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        log = LogTensors.of(dataset, model.scaling, self.device)
        run = SafeFQLRun(model, log, self.config, steps)
        options = FitOptions(
            progress_bar=progress_bar,
            log_dir=None if log_dir is None else Path(log_dir),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            checkpoint_every=checkpoint_every,
            stop_after=stop_after,
        )
        state, _ = run_phases(
            run.phases(),
            run.initial(generator),
            generator,
            transitions=len(log),
            actions=model.scaling.action_features,
            options=options,
            fingerprint=fingerprint(self.config, dataset, steps),
        )
        # What is deployed is what the advantages were fitted to: the critics' slow copies.
        self._adopt(model, {**state.networks, **state.targets})
        return self

    def _describe(self, dataset: OfflineDataset) -> Architecture:
        action = _box(dataset.action_space)
        scaling = Scaling.of(dataset)
        widths = scaling.observation_features, scaling.action_features
        hidden = self.config.critic_hidden
        return Architecture(
            dataset.observation_space,
            action,
            scaling,
            self.config.flow_hidden,
            self.config.student_hidden,
            SafetyCritics(
                *widths,
                hidden,
                safety_scale(dataset),
                continuous=dataset.constraint_kind == "continuous",
                discount=self.config.discount_of(dataset.constraint_kind),
            ),
            RewardCritics(*widths, hidden, *return_scale(dataset, self.config.discount)),
        )

    def _adopt(self, model: Architecture, networks: Networks) -> None:
        self._model = model
        self._networks = networks
        self._arrays = {
            name: {key: np.asarray(tensor.detach().cpu().numpy()) for key, tensor in params.items()}
            for name, params in networks.items()
        }

    def _fitted(self) -> Architecture:
        if self._model is None:
            raise RuntimeError("this agent has not been trained: call fit() or SafeFQL.load()")
        return self._model

    # -- acting -------------------------------------------------------------------------------

    def predict(
        self,
        observation: Batch,
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.float32], tuple[npt.NDArray[Any], ...] | None]:
        """Return actions and the state, which is passed through: Stable-Baselines3's signature.

        Args:
            observation: one, or a batch of them.
            state: unused; the actor has no memory.
            episode_start: unused.
            deterministic: use z = 0; otherwise one draw z ~ N(0, I).

        Raises:
            ValueError: a shape that is not the observation space's, or NaN.
        """
        model = self._fitted()
        rows, single = flat_observations(model.observation_space).rows(observation, "observation")
        rows = rows.astype(np.float32)
        if not np.isfinite(rows).all():
            raise ValueError(f"observation must be finite, got {observation}")
        played = flat_actions(model.action_space)
        shape = (len(rows), played.width)
        noise = np.zeros(shape) if deterministic else self._noise.standard_normal(shape)
        inputs = np.concatenate([model.scaling.observations(rows), noise.astype(np.float32)], -1)
        scaled = np.clip(forward(self._arrays[STUDENT], inputs)[0], -1.0, 1.0)
        actions = played.points(model.scaling.to_box(scaled))
        return (actions[0] if single else actions), state

    def shield(self) -> Shield:
        """Return an uncalibrated shield (delta 0) of this agent's critics, fallback its actor."""
        model = self._fitted()
        names = {**{name: name for name in (*SAFETY_NETWORKS, STUDENT)}, BEHAVIOUR: TEACHER}
        networks = {name: self._arrays[mine] for name, mine in names.items()}
        return Shield(
            SafetyModel(
                observation_space=model.observation_space,
                action_space=model.action_space,
                scaling=model.scaling,
                scale=model.safety.scale,
                networks=networks,
                flow_steps=self.config.flow_steps,
            ),
            trained_by=f"SafeFQL, seed {self.config.seed}",
        )

    # -- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to one safetensors file; nothing in it can run."""
        model = self._fitted()
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "config": dataclasses.asdict(self.config),
            "observation_space": space_to_json(model.observation_space),
            "action_space": space_to_json(model.action_space),
            "scaling": model.scaling.to_json(),
            "safety_scale": dataclasses.asdict(model.safety.scale),
            "reward_scale": [model.reward.offset, model.reward.spread],
        }
        flat = {f"{n}/{k}": a for n, params in self._arrays.items() for k, a in params.items()}
        write_tensors(path, flat, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "auto") -> Self:
        """Read an agent from a file that `save` wrote.

        Raises:
            ValueError: the file is damaged or of another kind.
        """
        file = read_tensors(path, _FORMAT)
        try:
            header = file.header
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']!r:.20}, known is {_VERSION}")
            config = SafeFQLConfig.from_json(header["config"])
            observation = flat_observations(space_from_json(header["observation_space"]))
            action = flat_actions(space_from_json(header["action_space"]))
            scaling = Scaling.from_json(header["scaling"], observation, action)
            widths = scaling.observation_features, scaling.action_features
            scale = SafetyScale.from_json(header["safety_scale"])
            mean, spread = (finite_number(x, "reward_scale") for x in header["reward_scale"])
            model = Architecture(
                observation.space,
                _box(action.space),
                scaling,
                config.flow_hidden,
                config.student_hidden,
                SafetyCritics(*widths, config.critic_hidden, scale),
                RewardCritics(*widths, config.critic_hidden, mean, spread),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: the header does not describe an agent: {error}") from error
        shapes = {
            f"{name}/{key}": shape
            for name, part in model.parts().items()
            for key, shape in part.shapes.items()
        }
        arrays = file.load(shapes)
        agent = cls(config, device=device)
        networks: Networks = {}
        for name, array in arrays.items():
            network, key = name.split("/")
            networks.setdefault(network, {})[key] = torch.tensor(array, device=agent.device)
        agent._adopt(model, networks)
        return agent
