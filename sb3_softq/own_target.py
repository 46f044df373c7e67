"""Target networks that are built where they are used: critics with batch normalisation can be their own target."""

from sb3_softq.base import MaximumEntropyAlgorithm
from sb3_softq.critic import ParticleCritic
from sb3_softq.policies import SoftQPolicy


class OwnTarget(MaximumEntropyAlgorithm):
    """Mixin of :class:`sb3_softq.SoftQ`: what the soft value of the next states is asked of."""

    policy: SoftQPolicy
    critic: ParticleCritic

    @property
    def _has_target(self) -> bool:
        """Whether the soft value is that of the target critics: not where critics with batch normalisation are their own."""
        return not self.policy.batch_norm or self.tau < 1.0 or self.target_update_interval > 1

    @property
    def critic_target(self) -> ParticleCritic:  # type: ignore[override]
        """Target networks: the critics themselves, where they are their own."""
        return self.critic if self.policy.critic_target is None else self.policy.critic_target

    def _build_target(self) -> None:
        """Target networks where they are used: ``tau`` may change on the way."""
        if self._has_target and self.policy.critic_target is None:
            self.policy.build_target()

    def _update_target(self) -> None:
        if self._has_target:
            super()._update_target()
