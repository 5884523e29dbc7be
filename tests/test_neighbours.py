"""Shields in other libraries: by an id, by a string of RL Zoo, for each agent of PettingZoo."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor

from safeshield import SafetyShield, Shield
from safeshield.shield import NearestAcceptable
from safeshield.spaces.generic import BEFORE_1_0
from safeshield.wrappers import CostFromStep

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_boats_pettingzoo.py"
BOAT = "safeshield/Boat-v0"
PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")


# -- an id for programs that take an id ---------------------------------------------------------


@pytest.mark.parametrize("name", ["safeshield:Shielded-v0", "safeshield/Shielded-v0"])
def test_an_id_makes_a_shielded_environment(name: str) -> None:
    env = gym.make(name, env_id=BOAT, shield="builtin:boat", max_episode_steps=3)
    same = SafetyShield(gym.make(BOAT), "builtin:boat")
    found, other = env.reset(seed=1)[1], same.reset(seed=1)[1]
    assert found["shield/certified"] is True
    assert found["shield/value"] == other["shield/value"]
    action = np.array([1.0, -1.0], np.float32)
    for _ in range(3):
        truncated, info = env.step(action)[3:]
        np.testing.assert_array_equal(
            info["action_executed"], same.step(action)[4]["action_executed"]
        )
    assert truncated
    assert env.spec is not None
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.reset(seed=1)[1]["shield/value"] == other["shield/value"]
    # One shield, also where the rebuilt spec lists the wrapper.
    assert str(again).count("SafetyShield") == 1


def test_the_id_passes_arguments_on() -> None:
    with pytest.warns(UserWarning, match=r"its arguments are {'dt': 0.02}, not {}"):
        env = gym.make(
            "safeshield/Shielded-v0", env_id=BOAT, shield="builtin:boat", render_mode="rgb_array",
            intervention_penalty=0.5, dt=0.02,
        )  # fmt: skip
    assert env.get_wrapper_attr("intervention_penalty") == 0.5
    assert env.reset(seed=0)[1]["shield/certified"] is False  # with another time step
    assert np.asarray(env.render()).shape == (512, 640, 3)
    shadow = gym.make("safeshield/Shielded-v0", env_id=BOAT, shield="builtin:boat", mode="shadow")
    assert "shield/would_intervene" in shadow.reset(seed=0)[1]
    if not BEFORE_1_0:  # whose make_vec takes no entry point that returns a wrapper
        envs = gym.make_vec("safeshield/Shielded-v0", 2, "sync", env_id=BOAT, shield="builtin:boat")
        assert envs.reset(seed=0)[1]["shield/certified"].tolist() == [True, True]


def test_the_pages_own_lines_run(boats: Any, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: ANN401
    monkeypatch.chdir(tmp_path)
    Shield.builtin("boat").save("ferry.safetensors")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks[:2]:
        exec(compile(block, "integrations", "exec"), {"parallel_env": boats()})


# -- RL Zoo -------------------------------------------------------------------------------------


ZOO = """
import gymnasium as gym
import yaml
from rl_zoo3.utils import get_wrapper_class
from stable_baselines3.common.env_util import make_vec_env

import safeshield

wrap = get_wrapper_class(yaml.safe_load(open("zoo.yaml"))["MyEnv-v0"])
venv = make_vec_env("safeshield/Boat-v0", n_envs=2, seed=0, wrapper_class=wrap)
venv.reset()
print([info["shield/certified"] for info in venv.reset_infos], venv.envs[0])
"""


def test_rl_zoo_finds_the_wrapper_by_its_string(tmp_path: Path) -> None:
    """In a process of its own, because RL Zoo changes Gymnasium where it is imported."""
    if find_spec("rl_zoo3") is None:
        pytest.skip("needs rl_zoo3")
    path = tmp_path / "shield.safetensors"
    Shield.builtin("boat").save(path)
    block = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    (tmp_path / "zoo.yaml").write_text(block.replace("/path/to/shield.safetensors", str(path)))
    done = subprocess.run(
        [sys.executable, "-c", ZOO], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[True, True] <CertifiedStarts<SafetyShield<Monitor<PatchedTimeLimit<" in done.stdout
    assert "not calibrated in this environment" not in done.stderr


def test_a_time_limit_of_rl_zoo_and_a_monitor_of_sb3_change_no_promise() -> None:
    """RL Zoo has its own TimeLimit, and Stable-Baselines3 puts a Monitor inside the shield."""

    class PatchedTimeLimit(gym.wrappers.TimeLimit):  # type: ignore[type-arg]
        def step(self, action: Any) -> Any:  # noqa: ANN401
            return super().step(action)

    inner = gym.make(BOAT).unwrapped
    env = SafetyShield(Monitor(PatchedTimeLimit(inner, 400)), "builtin:boat")
    assert env.reset(seed=0)[1]["shield/certified"] is True
    with pytest.warns(UserWarning, match="its episodes last up to 500 steps, not 400"):
        SafetyShield(Monitor(PatchedTimeLimit(inner, 500)), "builtin:boat")


# -- PettingZoo ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boats() -> Any:  # noqa: ANN401
    pytest.importorskip("pettingzoo")
    spec = importlib.util.spec_from_file_location("two_boats", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TwoBoats


def recording(env: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Let `env` keep the actions that it gets."""
    kept: list[dict[str, Any]] = []
    step = env.step

    def noted(actions: dict[str, Any]) -> Any:  # noqa: ANN401
        kept.append(dict(actions))
        return step(actions)

    env.step = noted
    return kept


@pytest.mark.filterwarnings("ignore::safeshield.UncalibratedShieldWarning")
def test_each_agent_is_judged_by_its_own_shield(boats: Any) -> None:  # noqa: ANN401
    from pettingzoo.test import parallel_api_test

    from safeshield.wrappers import ParallelSafetyShield

    shield = Shield.builtin("boat")
    strict = shield.with_delta(0.5).with_replacement(NearestAcceptable())
    inner = boats()
    kept = recording(inner)
    env = ParallelSafetyShield(inner, {"ferry": strict, "tug": "builtin:boat"})
    observations, infos = env.reset(seed=1)
    rng = np.random.default_rng(0)
    replaced = dict.fromkeys(env.possible_agents, 0)
    for _ in range(150):
        actions = {agent: rng.uniform(-1, 1, 2).astype("f4") for agent in env.agents}
        wanted = {
            agent: one.filter(observations[agent], actions[agent])
            for agent, one in (("ferry", strict), ("tug", shield))
        }
        observations, _, _, _, infos = env.step(actions)
        for agent, (executed, report) in wanted.items():
            np.testing.assert_array_equal(kept[-1][agent], executed)
            np.testing.assert_array_equal(infos[agent]["action_executed"], executed)
            np.testing.assert_array_equal(infos[agent]["action_proposed"], actions[agent])
            assert infos[agent]["shield/intervened"] == report.intervened
            assert infos[agent]["shield/certified"] is False
            replaced[agent] += int(report.intervened)
    assert infos["ferry"]["shield/threshold"] == -0.5
    assert replaced["ferry"] > replaced["tug"] > 0
    assert env.unwrapped is inner
    parallel_api_test(ParallelSafetyShield(boats(), {"ferry": shield, "tug": shield}), 50)


def test_no_agent_is_without_a_shield_unless_it_is_named(boats: Any) -> None:  # noqa: ANN401
    from safeshield.wrappers import ParallelSafetyShield

    shield = Shield.builtin("boat")
    with pytest.raises(ValueError, match="each agent needs a shield, and 'tug' has none: add it"):
        ParallelSafetyShield(boats(), {"ferry": shield})
    with pytest.raises(ValueError, match=r"agents of the environment, \['ferry', 'tug'\], got 'x'"):
        ParallelSafetyShield(boats(), {"ferry": shield, "x": shield}, unshielded=["tug"])
    with pytest.raises(ValueError, match="'tug' must be in shields or in unshielded, not in both"):
        ParallelSafetyShield(boats(), {"ferry": shield, "tug": shield}, unshielded=["tug"])
    with pytest.raises(ValueError, match="the shield of agent 'tug' does not fit: observation_spa"):
        ParallelSafetyShield(boats(), {"ferry": shield, "tug": "builtin:pendulum"})
    inner = boats()
    kept = recording(inner)
    env = ParallelSafetyShield(inner, {"ferry": shield}, unshielded=["tug"])
    _, infos = env.reset(seed=0)
    assert "shield/value" in infos["ferry"]
    assert "shield/value" not in infos["tug"]
    wild = np.array([np.nan, 0.0], np.float32)
    still = np.zeros(2, np.float32)
    infos = env.step({"ferry": wild, "tug": still})[4]
    assert infos["ferry"]["shield/intervened"]
    assert np.isfinite(kept[-1]["ferry"]).all()  # NaN never passes
    assert kept[-1]["tug"] is still
    with pytest.raises(ValueError, match="one for each agent that acts, and 'ferry' is missing"):
        env.step({"tug": still})
    with pytest.raises(ValueError, match="the environment is shielded already: put ParallelSafety"):
        ParallelSafetyShield(env, {"ferry": shield}, unshielded=["tug"]).reset()


def test_after_a_failed_step_no_action_is_judged(boats: Any) -> None:  # noqa: ANN401
    from safeshield.wrappers import ParallelSafetyShield

    env = ParallelSafetyShield(boats(), {"ferry": "builtin:boat"}, unshielded=["tug"])
    action = np.zeros(2, np.float32)
    env.reset(seed=0)
    with pytest.raises(KeyError):
        env.step({"ferry": action})  # The environment needs an action of the tug.
    with pytest.raises(ValueError, match=r"its last step or reset failed, .*; call reset\(\)"):
        env.step({"ferry": action, "tug": action})
    env.reset(seed=0)
    env.step({"ferry": action, "tug": action})


# -- cost conventions ---------------------------------------------------------------------------


def test_six_values_of_omnisafe_on_numpy_are_those_of_safety_gymnasium() -> None:
    """Both return (observation, reward, cost, terminated, truncated, info)."""

    class Native(gym.Env[Any, Any]):
        observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:  # noqa: ANN401
            return np.zeros(1, np.float32), np.float32(2.0), np.float32(1.0), False, False, {}

    env = CostFromStep(Native())
    env.reset()
    assert env.step(np.zeros(1))[1:] == (2.0, False, False, {"cost": 1.0})
