"""Options of the particles that soft Q-learning of 2017 and ablations need, and that recipe as a whole."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from stable_baselines3.common.type_aliases import Schedule

from sb3_softq.checks import MAX_ENT_COEF, check_choice, check_integer, check_number, check_schedule
from sb3_softq.stein import KernelName

ProposalName = Literal["policy", "uniform"]
RepulsionName = Literal["density", "kernel"]
# With fewer, a single sampler is not seen as it is
MIN_PARTICLES_OF_DENSITY = 16


@dataclass(frozen=True)
class ParticleOptions:
    """
    How the particles of the soft value and of the Stein step are drawn, kept apart and annealed.

    :param n_actor_states: Number of states of the minibatch in an actor update, at most ``batch_size``
    :param n_density_particles: Number of further particles per state that only help to evaluate the density of those that
        move. By default there are 16 in all, or more where each expert could not have as many: a density without some of
        the experts, or with some of them twice, teaches wrong proportions
    :param proposal: Where the particles of the soft value come from: the ``"policy"``, or ``"uniform"`` over the action box
    :param kernel: Kernel of the Stein step: ``"rbf"`` with the median heuristic, or ``"delta"``, its limit of bandwidth 0
    :param repulsion: What keeps the particles apart: the ``"density"`` of the sampling actor, or the gradient of the
        ``"kernel"`` as in the paper (see :func:`sb3_softq.stein.stein_direction`)
    :param kernel_update_ratio: In (0, 1): splits the actor's particles into a fixed part, where the critic's gradient is
        evaluated, and an updated part of this share, which moves (0.5 in 2017). By default every particle is both.
    :param annealing: Factor of the temperature in the actor's step (the critic's target keeps ``ent_coef``): a float >= 1
        or a function of the progress remaining. ``"auto"`` is 1 when the temperature is learned, since that anneals by
        itself, and when it is not falls from 20 to 1 over the first third of training, of which random steps
        (``learning_starts``) count as a tenth at most, or over 10,000 updates if they are fewer. It never rises again. Of a
        training in many calls ``learn(..., reset_num_timesteps=False)``, from the first one on, nobody knows the length:
        there it is 10,000 updates.
    :raises ValueError: if a value is out of its range
    """

    n_actor_states: int = 32
    n_density_particles: int | None = None
    proposal: ProposalName = "policy"
    kernel: KernelName = "rbf"
    repulsion: RepulsionName = "density"
    kernel_update_ratio: float | None = None
    annealing: str | float | Schedule = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_actor_states", check_integer("n_actor_states", self.n_actor_states, 1))
        if self.n_density_particles is not None:
            n_density_particles = check_integer("n_density_particles", self.n_density_particles, 0)
            object.__setattr__(self, "n_density_particles", n_density_particles)
        check_choice("proposal", self.proposal, get_args(ProposalName))
        check_choice("kernel", self.kernel, get_args(KernelName))
        check_choice("repulsion", self.repulsion, get_args(RepulsionName))
        if isinstance(self.annealing, str):
            check_choice("annealing", self.annealing, ("auto",))
        else:
            # the temperature times it is divided by too
            check_schedule("annealing", self.annealing, 1.0, open_low=False, high=MAX_ENT_COEF)
            if not callable(self.annealing):
                object.__setattr__(self, "annealing", float(self.annealing))
        if self.kernel_update_ratio is not None:
            check_number("kernel_update_ratio", self.kernel_update_ratio, 0.0, 1.0, open_low=True)
            if self.kernel_update_ratio == 1.0 or self.kernel == "delta":
                raise ValueError(
                    f"kernel_update_ratio={self.kernel_update_ratio!r} is not allowed: it must be < 1, and splits particles "
                    "of a kernel other than 'delta'"
                )
        if self.kernel == "delta" and self.repulsion == "kernel":
            raise ValueError("repulsion='kernel' is not allowed with kernel='delta', which has none: it must be 'density'")

    def check(self, n_actor_particles: int, smoothing: str, n_experts: int) -> None:
        """
        :param n_actor_particles: Number of particles per state in an actor update
        :param smoothing: Of the sampling actor
        :param n_experts: Of the sampling actor
        :raises ValueError: if the options do not fit them
        """
        if self.kernel_update_ratio is not None and n_actor_particles < 2:
            raise ValueError(
                f"n_actor_particles={n_actor_particles} is not allowed with kernel_update_ratio={self.kernel_update_ratio}, "
                "which splits them: it must be an integer >= 2"
            )
        n_experts = check_integer("n_experts", n_experts, 1)
        if n_experts > 1 and (self.n_fixed_particles(n_actor_particles) or n_actor_particles) < 2:
            split = "" if self.kernel_update_ratio is None else f" and kernel_update_ratio={self.kernel_update_ratio}"
            raise ValueError(
                f"n_actor_particles={n_actor_particles}{split} is not allowed with n_experts={n_experts}, whose weights "
                "follow from comparing particles that the critics are asked for: these must be at least 2"
            )
        if smoothing == "none" and self.repulsion == "density":
            raise ValueError(
                "repulsion='density' is not allowed with smoothing='none', which has no density: it must be 'kernel'"
            )

    def n_fixed_particles(self, n_actor_particles: int) -> int:
        """
        :param n_actor_particles: Number of particles per state in an actor update
        :return: How many of them do not move, because they are split; 0 where all do
        """
        if self.kernel_update_ratio is None:
            return 0
        return n_actor_particles - min(max(round(n_actor_particles * self.kernel_update_ratio), 1), n_actor_particles - 1)

    def density_particles(self, n_actor_particles: int, n_experts: int) -> int:
        """
        :param n_actor_particles: Number of particles per state in an actor update
        :param n_experts: Of the sampling actor
        :return: How many further particles help to evaluate their density
        """
        if self.n_density_particles is not None:
            return self.n_density_particles
        per_expert = math.ceil(max(n_actor_particles, MIN_PARTICLES_OF_DENSITY) / n_experts)
        return per_expert * n_experts - n_actor_particles

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, value: "ParticleOptions | Mapping[str, Any] | None") -> "ParticleOptions":
        """
        :param value: Options, a dict of those that differ from the defaults, or None for the defaults
        :return: The options
        :raises ValueError: if it is something else, or holds an option that is not known
        """
        if isinstance(value, cls):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"particle_options={value!r} is not allowed: it must be a ParticleOptions, a dict of its fields or None"
            )
        for name in value or {}:
            check_choice("key of particle_options", name, cls.names())
        return cls(**(value or {}))

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> "ParticleOptions":
        """
        :param state: Attributes of an agent, from which those that release 0.1.0 had in place of the options are removed
        :return: The agent's options
        """
        state.pop("bandwidth", None)
        old = {name: state.pop(name) for name in cls.names() if name in state}
        # what they were worth nothing against
        gone = {"imq": "rbf", "mixture": "policy"}
        old = {name: gone.get(value, value) if isinstance(value, str) else value for name, value in old.items()}
        return replace(cls.of(state.get("particle_options")), **old)


#: Soft Q-learning as published and coded in 2017: arguments of :class:`sb3_softq.SoftQ`, to which ``ent_coef`` comes, the
#: inverse of its reward scale (Walker2d 10; HalfCheetah, Hopper and Swimmer 30; Humanoid 100; Ant 300)
SQL_2017: dict[str, Any] = dict(
    learning_rate=3e-4,
    batch_size=128,
    tau=1.0,
    target_update_interval=1000,
    actor_tau=1.0,
    normalize_rewards=False,
    n_value_particles=16,
    n_actor_particles=16,
    particle_options=ParticleOptions(
        n_actor_states=128,
        n_density_particles=0,
        proposal="uniform",
        repulsion="kernel",
        kernel_update_ratio=0.5,
        annealing=1.0,
    ),
    policy_kwargs=dict(
        net_arch=dict(pi=[], qf=[128, 128]),
        head_arch=[128, 128],
        n_experts=1,
        n_critics=1,
        smoothing="none",
        batch_norm=False,
        n_bins=1,
    ),
)
