"""RayVecEnv: a vectorized environment whose environments live on the machines of a Ray cluster."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_softq.checks import check_integer, check_number
from sb3_softq.faults import CheckedDummyVecEnv, failed_index

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError
except ImportError as error:
    raise ImportError('sb3_softq.vec_env needs Ray: pip install "sb3-softq[ray]"') from error

logger = logging.getLogger(__name__)

#: How often starting an actor again is tried
START_ATTEMPTS = 3
# Seconds that an answer may take that is ready, from another machine
TRANSFER_TIMEOUT = 1.0
# Seconds until an actor that is to end its environments is killed
CLOSE_TIMEOUT = 60.0


class EnvWorker:
    """
    A share of the environments, in a process of its own: what it is asked, its ``DummyVecEnv`` does.

    :param env_fns: Functions that make them
    :param first: Index of the first one among all
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]], first: int):
        self.envs = CheckedDummyVecEnv(env_fns)
        self.first = first

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any]]:
        return self.envs.observation_space, self.envs.action_space

    def reset(self, seed: int | None, options: list[dict[str, Any]]) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        if seed is not None:
            self.envs.seed(seed)
        self.envs.set_options(options)
        with self._index_told():
            return self.envs.reset(), self.envs.reset_infos

    def step(self, actions: np.ndarray) -> tuple[VecEnvStepReturn, list[dict[str, Any]]]:
        with self._index_told():
            return self.envs.step(actions), self.envs.reset_infos

    @contextmanager
    def _index_told(self) -> Iterator[None]:
        """The traceback of an error stays here: it takes the index of the environment with it."""
        try:
            yield
        except Exception as error:
            index = failed_index(error)
            if index is not None:
                error.env_idx = self.first + index  # type: ignore[attr-defined]
            raise

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.envs, method)(*args, **kwargs)


class RayVecEnv(VecEnv):
    """
    Environments in Ray actors, on one machine or on all machines of a cluster; for any algorithm of Stable-Baselines3.

        make_vec_env("Walker2d-v4", n_envs=16, vec_env_cls=RayVecEnv, vec_env_kwargs=dict(address="auto"))

    An actor steps its share of the environments one after the other (in a ``DummyVecEnv``), and the actors work at the
    same time. The same seeds give the same trajectories as ``DummyVecEnv``.

    **An actor, or its machine, that dies** is started again where there is room, and the log says so; so is one that takes
    longer than ``timeout``, which is killed. Its episodes end as truncated: that step returns reward 0, ``done``,
    ``TimeLimit.truncated`` and ``actor_restarted`` in ``info``, the last observation received as ``terminal_observation``,
    and the first observation of a new episode. What ``set_attr`` changed is set again; what ``env_method`` changed is not.

    :param env_fns: Functions that make the environments, sent to the actors by cloudpickle
    :param n_actors: Number of actors, which share the environments evenly, from 1 to the number of environments.
        By default as many as the cluster has CPUs
    :param address: Address of a Ray cluster, ``"auto"`` for the one that this machine belongs to; by default that of the
        environment variable ``RAY_ADDRESS`` or else a new one on this machine. Not used where Ray has been initialized
    :param actor_options: Options of the actors, for example ``{"num_cpus": 1, "resources": {"simulator": 1}}``,
        see ``ray.actor.ActorClass.options``. By default they spread over the machines
    :param start_timeout: Seconds that an actor may take to start, a positive number
    :param timeout: Seconds that an actor may take for a step or a reset of its environments, or another answer, a positive
        number; None for ever
    :raises ValueError: if an argument is out of its range
    :raises TimeoutError: if an actor does not start in time, for example because the cluster has no room for it; in use, if
        one that was started again does not answer either
    """

    def __init__(
        self,
        env_fns: list[Callable[[], gym.Env]],
        n_actors: int | None = None,
        address: str | None = None,
        actor_options: dict[str, Any] | None = None,
        start_timeout: float = 300.0,
        timeout: float | None = None,
    ):
        if not env_fns:
            raise ValueError("env_fns=[] is not allowed: expected at least one function that makes an environment")
        if n_actors is not None:
            n_actors = check_integer("n_actors", n_actors, 1, len(env_fns))
        check_number("start_timeout", start_timeout, 0.0, open_low=True)
        if timeout is not None:
            check_number("timeout", timeout, 0.0, open_low=True)
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False if address is None else None)
        if n_actors is None:
            n_cpus = ray.cluster_resources().get("CPU", 1) / ((actor_options or {}).get("num_cpus") or 1)
            n_actors = min(len(env_fns), max(1, int(n_cpus)))

        self.env_fns = env_fns
        self.start_timeout = start_timeout
        self.timeout = timeout
        self.closed = False
        #: How often an actor has been started again
        self.n_restarts = 0
        # environments of each actor
        self._shares = np.array_split(np.arange(len(env_fns)), n_actors)
        self._actor_class = ray.remote(EnvWorker).options(**({"scheduling_strategy": "SPREAD"} | (actor_options or {})))
        self._actors = [self._start(share) for share in self._shares]
        # results of the step that is under way, and when it began
        self._steps: list[Any] | None = None
        self._asked_at = 0.0
        # per actor, the last observations received, and after its death those of the new episodes
        self._last_obs: list[Any] = [None] * n_actors
        self._new_obs: dict[int, Any] = {}
        self._attributes: dict[tuple[int, str], Any] = {}
        self._restart_seed: int | None = None

        # all of them: VecEnv asks each for its render_mode
        spaces = [self._wait_for_start(actor) for actor in self._actors]
        super().__init__(len(env_fns), *spaces[0])

    # ------------------------------------------------------------------ episodes

    def reset(self) -> VecEnvObs:
        if self._steps is not None:
            self.step_wait()
        if self._seeds[0] is not None:
            self._restart_seed = self._seeds[0]
        arguments = [(self._seeds[share[0]], [self._options[i] for i in share]) for share in self._shares]
        self._asked_at = time.monotonic()
        refs = [actor.reset.remote(*args) for actor, args in zip(self._actors, arguments, strict=True)]
        results = [self._get(i, refs[i], "reset", *arguments[i]) for i in range(len(refs))]
        self._last_obs = [obs for obs, _ in results]
        self.reset_infos = [info for _, infos in results for info in infos]
        self._new_obs.clear()
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return self._join(self._last_obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._asked_at = time.monotonic()
        # an actor that has started again since has an episode to begin, not one to continue
        self._steps = [
            None if i in self._new_obs else actor.step.remote(actions[share])
            for i, (actor, share) in enumerate(zip(self._actors, self._shares, strict=True))
        ]

    def step_wait(self) -> VecEnvStepReturn:
        assert self._steps is not None, "step_wait() without step_async()"
        steps, self._steps = self._steps, None
        results = []
        for i, step in enumerate(steps):
            try:
                result, reset_infos = self._truncated_step(i) if step is None else self._wait(step)
            except (RayActorError, GetTimeoutError) as error:
                # unless a question asked meanwhile has found it dead
                if i not in self._new_obs:
                    self._restart(i, error)
                result, reset_infos = self._truncated_step(i)
            results.append(result)
            self._last_obs[i] = result[0]
            self.reset_infos[self._shares[i][0] : self._shares[i][-1] + 1] = reset_infos
        _, rewards, dones, infos = zip(*results, strict=True)
        return self._join(self._last_obs), np.concatenate(rewards), np.concatenate(dones), [i for part in infos for i in part]

    def _truncated_step(self, i: int) -> tuple[VecEnvStepReturn, list[dict[str, Any]]]:
        """The step that an actor could not make."""
        obs, reset_infos = self._new_obs.pop(i)
        infos: list[dict[str, Any]] = [
            {"TimeLimit.truncated": True, "actor_restarted": True, "terminal_observation": self._take(self._last_obs[i], j)}
            for j in range(len(self._shares[i]))
        ]
        return (obs, np.zeros(len(infos), dtype=np.float32), np.ones(len(infos), dtype=bool), infos), reset_infos

    @staticmethod
    def _join(parts: list[Any]) -> VecEnvObs:
        """Observations of all environments from those of the actors."""
        if isinstance(parts[0], dict):
            return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if isinstance(parts[0], tuple):
            return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        return np.concatenate(parts)

    @staticmethod
    def _take(obs: Any, j: int) -> Any:
        """Observation of one environment."""
        if isinstance(obs, dict):
            return {key: value[j] for key, value in obs.items()}
        return tuple(value[j] for value in obs) if isinstance(obs, tuple) else obs[j]

    # ------------------------------------------------------------------ actors

    def _start(self, share: np.ndarray) -> Any:
        return self._actor_class.remote([self.env_fns[i] for i in share], int(share[0]))

    def _wait(self, ref: Any) -> Any:
        """For an answer: of actors that were asked at once, each has the time that is left, and that to bring it here."""
        if self.timeout is None:
            return ray.get(ref)
        left = self._asked_at + self.timeout - time.monotonic()
        return ray.get(ref, timeout=max(left, min(self.timeout, TRANSFER_TIMEOUT)))

    def _wait_for_start(self, actor: Any) -> Any:
        try:
            return ray.get(actor.spaces.remote(), timeout=self.start_timeout)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"An actor has not started within start_timeout={self.start_timeout:g} seconds. "
                f"Resources of the cluster that are free: {ray.available_resources()}"
            ) from error

    def _ask_again(self, i: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """What an actor that has just started is asked has an answer, or there is no use in starting it again."""
        try:
            return ray.get(getattr(self._actors[i], method).remote(*args, **kwargs), timeout=self.timeout)
        except GetTimeoutError as error:
            share = self._shares[i]
            raise TimeoutError(
                f"An actor with environments {share[0]} to {share[-1]} has not answered {method}() within timeout="
                f"{self.timeout:g} seconds, and has not done so after it was started again either"
            ) from error

    def _get(self, i: int, ref: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Wait for an answer, and ask again if the actor dies meanwhile, or takes too long."""
        try:
            return self._wait(ref)
        except (RayActorError, GetTimeoutError) as error:
            self._restart(i, error)
            return self._ask_again(i, method, *args, **kwargs)

    def _restart(self, i: int, error: RayActorError | GetTimeoutError) -> None:
        """Start an actor anew, and an episode in each of its environments."""
        self.n_restarts += 1
        share = self._shares[i]
        logger.warning(
            "Actor %d with environments %d to %d %s and is started again, its episodes are truncated: %s",
            *(i, share[0], share[-1], "died" if isinstance(error, RayActorError) else f"hung for {self.timeout} s", error),
        )
        seed = None
        if self._restart_seed is not None:
            # not the episodes that the environments have had, nor those of others
            seed = int(np.random.SeedSequence([self._restart_seed, i, self.n_restarts]).generate_state(1)[0])
        for attempt in range(1, START_ATTEMPTS + 1):
            # lost from sight is not always dead
            ray.kill(self._actors[i])
            actor = self._actors[i] = self._start(share)
            try:
                self._wait_for_start(actor)
                for (index, name), value in self._attributes.items():
                    if index in share:
                        self._ask_again(i, "call", "set_attr", name, value, index - int(share[0]))
                self._new_obs[i] = self._ask_again(i, "reset", seed, [{} for _ in share])
                return
            except RayActorError as again:
                # a machine that dies can be chosen again before its death is known
                if again.actor_init_failed or attempt == START_ATTEMPTS:
                    raise
                time.sleep(attempt)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        # Ray may have been shut down, with all actors
        if ray.is_initialized():
            for actor in self._actors:
                # whatever one raises, or if it hangs, the others are ended too
                with suppress(RayError):
                    ray.get(actor.call.remote("close"), timeout=self.timeout or CLOSE_TIMEOUT)
                ray.kill(actor)

    # ------------------------------------------------------------------ questions to the environments

    def _ask(self, indices: VecEnvIndices, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Answers of that method of ``DummyVecEnv``, one per environment."""
        chosen = [range(self.num_envs)[index] for index in self._get_indices(indices)]
        calls = []
        self._asked_at = time.monotonic()
        for i, share in enumerate(self._shares):
            mine = [index for index in chosen if index in share]
            if mine:
                here = {"indices": [index - int(share[0]) for index in mine]} | kwargs
                calls.append((i, mine, here, self._actors[i].call.remote(method, *args, **here)))
        answers = dict.fromkeys(chosen)
        for i, mine, here, ref in calls:
            # set_attr has no answer
            answers |= dict(zip(mine, self._get(i, ref, "call", method, *args, **here) or [], strict=False))
        return [answers[index] for index in chosen]

    def has_attr(self, attr_name: str) -> bool:
        self._asked_at = time.monotonic()
        refs = [actor.call.remote("has_attr", attr_name) for actor in self._actors]
        return all([self._get(i, ref, "call", "has_attr", attr_name) for i, ref in enumerate(refs)])

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._ask(indices, "get_attr", attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._ask(indices, "set_attr", attr_name, value)
        self._attributes |= {(range(self.num_envs)[index], attr_name): value for index in self._get_indices(indices)}

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return self._ask(indices, "env_method", method_name, *method_args, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._ask(indices, "env_is_wrapped", wrapper_class)

    def get_images(self) -> list[np.ndarray | None]:
        self._asked_at = time.monotonic()
        refs = [actor.call.remote("get_images") for actor in self._actors]
        return [image for i, ref in enumerate(refs) for image in self._get(i, ref, "call", "get_images")]
