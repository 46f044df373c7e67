"""Learning from logged data: offline first, then online with a share of each minibatch from the data."""

from collections.abc import Iterable
from typing import Any, TypeVar

from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.utils import configure_logger

from sb3_softq.checks import check_integer, check_number
from sb3_softq.data import Trajectory, fit_normalization, join_samples, replay_buffer_of
from sb3_softq.finite import check_parameters
from sb3_softq.off_policy import CheckedOffPolicyAlgorithm

SelfLogged = TypeVar("SelfLogged", bound="LoggedData")


class LoggedData(CheckedOffPolicyAlgorithm):
    """Mixin of the algorithms: trajectories beside the agent's own transitions."""

    # Replay buffer of trajectories, which is not saved with the agent
    logged_data: ReplayBuffer | None = None
    # Of each minibatch
    data_share = 0.5
    _is_offline = False

    def set_data(self: SelfLogged, trajectories: Iterable[Trajectory] | None, share: float = 0.5) -> SelfLogged:
        """
        Learn from logged data too, such as demonstrations: from them alone in :meth:`pretrain`, in a share of a minibatch in
        ``learn`` (Ball et al. 2023, https://arxiv.org/abs/2302.02948). They are not saved with the agent: set them again for
        one that was loaded.

        :param trajectories: Of :func:`sb3_softq.data.from_minari`, or made of arrays; None to learn without from now on
        :param share: Of each minibatch, from 0 to 1
        :return: This agent
        :raises ValueError: if a trajectory does not fit the agent's spaces, naming it
        """
        check_number("share", share, 0.0, 1.0)
        self.data_share = float(share)
        if trajectories is None:
            self.logged_data = None
            return self
        assert self.replay_buffer is not None
        assert self.policy is not None
        scale = self.policy.scale_action if self.policy.squash_output else lambda actions: actions
        self.logged_data = replay_buffer_of(
            trajectories, self.observation_space, self.action_space, scale, like=self.replay_buffer
        )
        return self

    @property
    def has_data(self) -> bool:
        """Whether there are transitions to learn from, logged ones or the agent's own."""
        return self.logged_data is not None or (self.replay_buffer is not None and self.replay_buffer.size() > 0)

    @property
    def awaits_episode(self) -> bool:
        """Whether it goes on without its replay buffer, and the new one has no episode yet that HER could draw goals from."""
        buffer = self.replay_buffer
        if self._is_offline or not isinstance(buffer, HerReplayBuffer) or buffer.full:
            return False
        # lengths of the first episodes are 0 until they end
        return self.num_timesteps > buffer.pos * buffer.n_envs and not buffer.ep_length[0].any()

    def pretrain(self: SelfLogged, n_updates: int, log_interval: int = 1_000) -> SelfLogged:
        """
        Learn from the logged data alone, without the environment.

        :param n_updates: Number of gradient steps
        :param log_interval: Write the log after so many of them
        :return: This agent
        :raises ValueError: if there are no data, see :meth:`set_data`
        """
        n_updates = check_integer("n_updates", n_updates, 1)
        log_interval = check_integer("log_interval", log_interval, 1)
        self._begin_offline("pretrain")
        self._is_offline = True
        try:
            self._update_offline(n_updates, log_interval)
        finally:
            self._is_offline = False
        check_parameters(self.policy, self.num_timesteps)
        return self

    def _begin_offline(self, tb_log_name: str) -> None:
        """What ``learn`` does before an agent learns."""
        if self.logged_data is None:
            raise ValueError("there are no data to learn from: set_data(trajectories) comes first")
        if self._vec_normalize_env is not None and self._vec_normalize_env.training:
            fit_normalization(self._vec_normalize_env, self.logged_data)
        # in the middle of a training, episodes and schedules of it go on
        self._begin_learning(reset_num_timesteps=self.num_timesteps == 0)
        self._begin_log(tb_log_name)

    def _begin_log(self, tb_log_name: str) -> None:
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, True)

    def _update_offline(self, n_updates: int, log_interval: int) -> None:
        for done in range(n_updates):
            # schedules run from the first to the last update
            self._update_current_progress_remaining(done, n_updates)
            self.train(1, self.batch_size)
            if (done + 1) % log_interval == 0 or done + 1 == n_updates:
                self.logger.dump(self._n_updates)

    def _sample(self, batch_size: int) -> Any:
        """A minibatch, normalised as the agent's environment is."""
        env = self._vec_normalize_env
        share = 0.0 if self.logged_data is None else 1.0 if self._is_offline else self.data_share
        n_logged = round(share * batch_size)
        if 0.0 < share < 1.0 and batch_size > 1:
            # of a small minibatch too, both have a part
            n_logged = min(max(n_logged, 1), batch_size - 1)
        parts = []
        if n_logged < batch_size:
            assert self.replay_buffer is not None
            parts.append(self.replay_buffer.sample(batch_size - n_logged, env=env))
        if n_logged > 0:
            assert self.logged_data is not None
            parts.append(self.logged_data.sample(n_logged, env=env))
        return parts[0] if len(parts) == 1 else join_samples(*parts)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "logged_data", "_is_offline"]
