"""Policies whose actor is averaged: the exponential moving average (EMA) of its weights, and who has written into them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_softq.actor import SamplingActor
from sb3_softq.critic import ParticleCritic
from sb3_softq.networks import polyak_update

# The EMA actor begins as the average over the last one of so many parts of the updates
AVERAGING_PARTS = 9
# Number of updates behind an EMA actor that has come from elsewhere: it is no beginner's
MATURE = 1e9


class AveragedPolicy(BasePolicy):
    """
    Policy with an actor, its EMA and critics. ``n_averaged`` is the number of updates in the average, and ``is_taught`` says
    whether the critics know the actor's actions: they have taught it, and nobody else has written into it since.
    """

    actor: SamplingActor
    ema_actor: SamplingActor
    critic: ParticleCritic
    critic_target: ParticleCritic | None
    n_averaged: float
    is_taught: bool
    _ema_version: int
    _ema_bias: th.Tensor

    @property
    def averaged_actor(self) -> SamplingActor:
        """``ema_actor`` by its name in release 0.1.0."""
        return self.ema_actor

    def adopt_actor(self) -> None:
        """The actor's weights come from elsewhere, and these critics know nothing of its actions."""
        self.n_averaged, self.is_taught = MATURE, False

    def begin_average(self) -> None:
        """
        Average from the next update on as if it were the first: what the critics learn from now on is from other data, maybe
        of another task, and an average over the actors before would follow only slowly. An actor that came from elsewhere is
        kept, since these critics know nothing of it yet.
        """
        if self.is_taught:
            self.n_averaged = 0.0

    def update_ema_actor(self, tau: float) -> None:
        """
        Polyak averaging of the EMA actor towards the actor, after an update of it. The coefficient is ``tau``, or 9 / (n + 9)
        at the n-th update while that is larger: about an average over the last ninth of the updates.

        :param tau: Polyak coefficient, in (0, 1]
        """
        self.n_averaged, self.is_taught = self.n_averaged + 1.0, True
        polyak_update(self.actor, self.ema_actor, max(tau, AVERAGING_PARTS / (self.n_averaged + AVERAGING_PARTS)))
        self._follow()

    def sync_ema_actor(self, force: bool = False) -> None:
        """
        Make the EMA actor a copy of the actor, if somebody else than training has written into the actor since its last
        update. All that asks, trains or saves the policy calls this, so that who trains the actor sees what it has learned:

            optimizer = th.optim.Adam(model.actor.parameters(), lr=1e-3)
            for obs, actions in demonstrations:  # tensors; actions in the normalised box (-1, 1)^d
                loss = (model.policy(obs, deterministic=True) - actions).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.predict(...)  # imitates; model.learn(...) goes on from there

        Noticed is all that changes the bias of the output layer, and elsewhere what autograd sees, as the steps of most
        optimizers and ``load_state_dict``. From the copy, averaging goes on with the coefficient of late training.

        :param force: Copy in any case: for what fused optimizers or ``.data`` have written into other layers alone
        """
        written = self._actor_version() != self._ema_version or not th.equal(self._output_bias(), self._ema_bias)
        if force or written:
            polyak_update(self.actor, self.ema_actor, tau=1.0)
            self.adopt_actor()
            self._follow()

    def _follow(self) -> None:
        """The EMA actor belongs to the actor as it stands."""
        self._ema_version = self._actor_version()
        self._ema_bias = self._output_bias().clone()

    def _actor_version(self) -> int:
        """Changes when autograd sees that the actor's weights are written to, which is not so with fused optimizers."""
        return sum(parameter._version for parameter in self.actor.optimizer.param_groups[0]["params"])

    def _output_bias(self) -> th.Tensor:
        """What any training of the actor changes."""
        return self.actor.head[-1].bias.detach()  # type: ignore[operator]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.sync_ema_actor()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # floats, as all that is saved: they can be perturbed or averaged like weights
        for name in ("n_averaged", "is_taught"):
            destination[prefix + name] = th.tensor([float(getattr(self, name))], device=self.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # its name in release 0.1.0, which did not save the count either
        old, new = prefix + "averaged_actor.", prefix + "ema_actor."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
        critic, target = prefix + "critic.", prefix + "critic_target."
        saved = [key for key in state_dict if key.startswith(target)]
        if self.critic_target is None:
            # release 0.1.0 saved target networks that nobody asked
            for key in saved:
                state_dict.pop(key)
        elif not saved:
            # where there were none, they begin as a copy of the critics
            for key in [key for key in state_dict if key.startswith(critic)]:
                state_dict[target + key.removeprefix(critic)] = state_dict[key]
        n_averaged, is_taught = (state_dict.pop(prefix + name, None) for name in ("n_averaged", "is_taught"))
        if n_averaged is not None:
            self.n_averaged = float(n_averaged)
            self.is_taught = _was_taught(self.n_averaged) if is_taught is None else float(is_taught) > 0.5
        elif any(key.startswith(new) for key in state_dict):
            self.adopt_actor()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state_dict, strict, assign)
        if any(key.startswith(("ema_actor.", "averaged_actor.")) for key in state_dict):
            # it came with the actor
            self._follow()
        return result

    def load_from_vector(self, vector: np.ndarray) -> None:
        super().load_from_vector(vector)
        # The EMA actor came with the actor; the statistics of batch normalisation, by which critics could choose, did not
        self._follow()
        self.adopt_actor()

    def __getstate__(self) -> dict[str, Any]:
        self.sync_ema_actor()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "averaged_actor" in self._modules:  # its name in agents that release 0.1.0 pickled
            self._modules["ema_actor"] = self._modules.pop("averaged_actor")
        # the parameters of a copy count anew
        self._ema_version = self._actor_version()
        # they did not have these
        self.__dict__.update({"n_averaged": MATURE, "n_experts": 1, "n_bins": 1} | self.__dict__)
        self.__dict__.setdefault("is_taught", _was_taught(self.n_averaged))
        self.register_buffer("_ema_bias", self._output_bias().clone(), persistent=False)
        self.ema_actor.freeze()
        if self.critic_target is not None:
            self.critic_target.freeze()


def _was_taught(n_averaged: float) -> bool:
    """Of agents that were saved without ``is_taught``, who told it by this number."""
    return n_averaged not in (0.0, MATURE)
