"""Logged data: trajectories of demonstrations, or of another agent, from arrays, Minari or a replay buffer, and back."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.vec_env import VecNormalize

if TYPE_CHECKING:
    from minari import MinariDataset

# How far beyond the box an action may lie by rounding, in units of the box
TOLERANCE = 1e-3


class Trajectory(NamedTuple):
    """
    One episode of n steps, as the environment gave it.

    :param observations: Before each step and after the last one, shape (n + 1, ...), or a dict of such arrays
    :param actions: In the environment's units, shape (n, ...)
    :param rewards: Shape (n,)
    :param terminated: Whether it terminated; else it was cut off, by a time limit say
    """

    observations: np.ndarray | dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def from_minari(dataset: "str | MinariDataset") -> Iterator[Trajectory]:
    """
    Episodes of a Minari data set (https://minari.farama.org).

    :param dataset: Its name, where it has been downloaded or made on this machine, or the data set itself
    :return: Its episodes, read one by one
    :raises ImportError: without Minari
    :raises FileNotFoundError: if there is no data set of this name
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError('Minari data sets need minari: pip install "sb3-softq[minari]"') from error
    opened = minari.load_dataset(dataset) if isinstance(dataset, str) else dataset
    for episode in opened.iterate_episodes():
        yield Trajectory(episode.observations, episode.actions, episode.rewards, bool(episode.terminations[-1]))


def from_agent(agent: OffPolicyAlgorithm) -> Iterator[Trajectory]:
    """
    What an agent's replay buffer holds, of any algorithm of Stable-Baselines3, as data for another agent.

    :param agent: Agent with its replay buffer (``load_replay_buffer``)
    :return: Its episodes, those of each environment together; the first and the last may be parts
    :raises ValueError: if it has no replay buffer, or an empty one
    """
    buffer = agent.replay_buffer
    if buffer is None or buffer.size() == 0:
        raise ValueError(f"agent={agent!r} has nothing in its replay buffer: load_replay_buffer(...) comes first")
    rows = (np.arange(buffer.size()) + buffer.pos * buffer.full) % buffer.buffer_size
    # the next observation of the newest transition lies where the oldest one was
    rows = rows[int(buffer.optimize_memory_usage and buffer.full) :]
    for env in range(buffer.n_envs):
        ends = np.flatnonzero(buffer.dones[rows, env]) + 1
        episodes = [episode for episode in np.split(rows, ends) if len(episode) > 0]
        for part in chain.from_iterable(_pieces(buffer, episode, env) for episode in episodes):
            last = part[-1]
            observations = _observations(buffer, part, env, agent.observation_space)
            actions = buffer.actions[part, env].reshape(len(part), *(agent.action_space.shape or ()))
            if agent.policy.squash_output:
                actions = agent.policy.unscale_action(actions)
            terminated = bool(buffer.dones[last, env] and not buffer.timeouts[last, env])
            yield Trajectory(observations, actions, buffer.rewards[part, env], terminated)


def _pieces(buffer: ReplayBuffer, part: np.ndarray, env: int) -> list[np.ndarray]:
    """Rows of one episode, split where another one began before it had ended, as at a new call of ``learn``."""
    if buffer.optimize_memory_usage:
        # each next observation is that of the next row
        return [part]
    goes_on = np.ones(len(part) - 1, dtype=bool)
    for observations, next_observations in _arrays(buffer):
        same = next_observations[part[:-1], env] == observations[part[1:], env]
        goes_on &= same.all(axis=tuple(range(1, same.ndim)))
    return np.split(part, np.flatnonzero(~goes_on) + 1)


def _arrays(buffer: ReplayBuffer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations and next observations, of each key where they are Dicts."""
    if isinstance(buffer, DictReplayBuffer):
        return [(values, buffer.next_observations[key]) for key, values in buffer.observations.items()]
    return [(buffer.observations, buffer.next_observations)]


def _observations(
    buffer: ReplayBuffer, part: np.ndarray, env: int, space: spaces.Space[Any]
) -> np.ndarray | dict[str, np.ndarray]:
    """Of consecutive rows, and the one after the last."""
    if buffer.optimize_memory_usage:
        return _shaped(buffer.observations[[*part, (part[-1] + 1) % buffer.buffer_size], env], space)
    rows = [np.concatenate([values[part, env], after[part[-1:], env]]) for values, after in _arrays(buffer)]
    if isinstance(space, spaces.Dict):
        return {key: _shaped(values, space[key]) for key, values in zip(buffer.observations, rows, strict=True)}
    return _shaped(rows[0], space)


def _shaped(rows: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """The buffer gives observations of Discrete spaces an axis."""
    return rows.reshape(len(rows), *(space.shape or ()))


def replay_buffer_of(
    trajectories: Iterable[Trajectory],
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    scale_action: Callable[[np.ndarray], np.ndarray],
    like: ReplayBuffer,
) -> ReplayBuffer:
    """
    A replay buffer that holds trajectories and no more.

    :param trajectories: At least one
    :param observation_space: Of the agent
    :param action_space: Of the agent
    :param scale_action: Maps actions to those that the agent's replay buffer holds
    :param like: The agent's replay buffer, whose samples can be put together with those of the new one
    :return: The buffer
    :raises ValueError: if a trajectory does not fit the spaces, or is not finite, naming it
    """
    if isinstance(trajectories, Trajectory):
        raise ValueError("trajectories=Trajectory(...) is not allowed: it must be a list of them, of one too")
    checked = [_checked(trajectory, i, observation_space, action_space) for i, trajectory in enumerate(trajectories)]
    if not checked:
        raise ValueError("trajectories=[] is not allowed: there must be one at least")
    cls: type[ReplayBuffer] = DictReplayBuffer if isinstance(observation_space, spaces.Dict) else ReplayBuffer
    kwargs: dict[str, Any] = {}
    if isinstance(like, NStepReplayBuffer):
        cls, kwargs = NStepReplayBuffer, dict(n_steps=like.n_steps, gamma=like.gamma)
    n_steps = sum(len(trajectory.rewards) for trajectory in checked)
    buffer = cls(n_steps, observation_space, action_space, device=like.device, n_envs=1, **kwargs)
    for observations, actions, rewards, terminated in checked:
        scaled = scale_action(actions)
        last = len(rewards) - 1
        for i, reward in enumerate(rewards):
            info = {"TimeLimit.truncated": i == last and not terminated}
            obs, next_obs = _row(observations, i), _row(observations, i + 1)
            buffer.add(obs, next_obs, scaled[i : i + 1], np.array([reward]), np.array([i == last]), [info])  # type: ignore[arg-type]
    return buffer


def join_samples(first: Any, second: Any) -> Any:
    """
    :param first: Samples of a replay buffer
    :param second: Of another one of the same kind
    :return: The samples of both
    """
    if first is None:
        return None
    if isinstance(first, th.Tensor):
        return th.cat([first, second])
    if isinstance(first, dict):
        return {key: join_samples(first[key], second[key]) for key in first}
    return type(first)(*(join_samples(a, b) for a, b in zip(first, second, strict=True)))


def fit_normalization(env: VecNormalize, buffer: ReplayBuffer) -> None:
    """
    Give a VecNormalize that has seen nothing yet the statistics of logged data.

    :param env: Keeps what it has seen of observations, and of returns
    :param buffer: Of :func:`replay_buffer_of`
    """
    if env.norm_obs:
        rms: Any = env.obs_rms
        of_dict = isinstance(buffer, DictReplayBuffer)
        pairs = [(rms[key], buffer.observations[key]) for key in rms] if of_dict else [(rms, buffer.observations)]
        for statistics, observations in pairs:
            if statistics.count < 1:
                statistics.update(observations[: buffer.size(), 0])
    if env.norm_reward and env.ret_rms.count < 1:
        returns = [0.0]
        for reward, done in zip(buffer.rewards[: buffer.size(), 0], buffer.dones[: buffer.size(), 0], strict=True):
            returns[-1] += float(reward)
            returns.append(0.0 if done else env.gamma * returns[-1])
        env.ret_rms.update(np.array(returns[:-1]))


def _row(observations: np.ndarray | dict[str, np.ndarray], i: int) -> np.ndarray | dict[str, np.ndarray]:
    """One observation, with an axis for the one environment."""
    if isinstance(observations, dict):
        return {key: values[i : i + 1] for key, values in observations.items()}
    return observations[i : i + 1]


def _checked(
    trajectory: Trajectory, i: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> Trajectory:
    """The trajectory as arrays that fit the spaces."""
    name = f"trajectories[{i}]"
    if not (isinstance(trajectory, tuple) and len(trajectory) == len(Trajectory._fields)):
        raise ValueError(f"{name} is a {type(trajectory).__name__}: it must be a Trajectory({', '.join(Trajectory._fields)})")
    observations, actions, rewards, terminated = trajectory
    rewards = np.asarray(rewards, dtype=np.float32)
    if rewards.ndim != 1 or len(rewards) == 0:
        raise ValueError(f"{name} has rewards of shape {rewards.shape}: it must be (n,), of at least one step")
    n = len(rewards)
    if isinstance(observation_space, spaces.Dict):
        if not isinstance(observations, dict) or observations.keys() != observation_space.spaces.keys():
            given = list(observations) if isinstance(observations, dict) else type(observations).__name__
            raise ValueError(f"{name} has observations {given}: it must be a dict of {list(observation_space.spaces)}")
        observations = {
            key: _checked_observations(observations[key], space, n, f"{name}, {key!r}")
            for key, space in observation_space.spaces.items()
        }
    else:
        observations = _checked_observations(observations, observation_space, n, name)
    actions = _as_stored(np.asarray(actions), action_space)
    if actions.shape != (n, *(action_space.shape or ())):
        raise ValueError(f"{name} has actions of shape {actions.shape}: it must be {(n, *(action_space.shape or ()))}")
    for label, values in (("rewards", rewards), ("actions", actions)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has {label} that are not finite, in step {_first_row(~np.isfinite(values))}")
    if isinstance(action_space, spaces.Box):
        beyond = np.maximum(action_space.low - actions, actions - action_space.high) > TOLERANCE * (
            action_space.high - action_space.low
        )
        actions = np.clip(actions, action_space.low, action_space.high)
    else:
        beyond = np.array([not action_space.contains(action) for action in actions])
    if beyond.any():
        raise ValueError(f"{name} has actions that are not in {action_space}, in step {_first_row(beyond)}")
    return Trajectory(observations, actions, rewards, bool(terminated))


def _checked_observations(values: Any, space: spaces.Space[Any], n_steps: int, name: str) -> np.ndarray:
    shape = space.shape or ()
    array = np.asarray(values)
    if isinstance(space, spaces.Box) and array.shape[1:] != shape:
        # images as environments give them
        array = maybe_transpose(array, space)
    if array.shape != (n_steps + 1, *shape):
        raise ValueError(
            f"{name} has observations of shape {array.shape}: it must be {(n_steps + 1, *shape)}, one more than it has rewards"
        )
    array = _as_stored(array, space)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has observations that are not finite, in step {_first_row(~np.isfinite(array))}")
    beyond = ~_belongs(array, space)
    if beyond.any():
        raise ValueError(f"{name} has observations that are not in {space}, in step {_first_row(beyond)}")
    return array


def _belongs(array: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Whether each number is one of a space of whole numbers, for instance a pixel; floats may leave their bounds."""
    bounds: tuple[Any, Any] = (0, 1)  # of MultiBinary
    if isinstance(space, spaces.Box):
        if np.issubdtype(space.dtype, np.floating):
            return np.ones(array.shape, dtype=bool)
        bounds = space.low, space.high
    elif isinstance(space, spaces.Discrete):
        bounds = 0, space.n - 1
    elif isinstance(space, spaces.MultiDiscrete):
        bounds = 0, space.nvec - 1
    return (bounds[0] <= array) & (array <= bounds[1]) & (np.floor(array) == array)


def _as_stored(array: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """In the precision of the space, in which a number may be infinite."""
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        return array
    with np.errstate(over="ignore"):
        return array.astype(space.dtype, copy=False)


def _first_row(wrong: np.ndarray) -> int:
    return int(np.argwhere(wrong)[0][0])
