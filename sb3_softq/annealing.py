"""Annealing of a fixed temperature: the actor starts hotter, so that modes are found before they are covered."""

from dataclasses import dataclass

# Factor of the temperature at the start. It falls to 1 within a part of training, or a number of updates if that is less:
# exploration of a long run is not its business.
FACTOR = 20.0
PART_OF_TRAINING = 1 / 3
N_UPDATES = 10_000
# Of that training at most so much are random steps, before there is an actor to be annealed: more of them are not counted
PART_OF_RANDOM_STEPS = 0.1


@dataclass
class Annealing:
    """
    The clock of ``annealing="auto"``.

    :param done: How far it has come, from 0 to 1; it never goes back once there were steps of an environment
    :param length_is_known: Whether the length of training is known, or only how many updates there have been
    :param length: Part of the training that counts, from above 0 to 1: less than 1 where more than
        ``PART_OF_RANDOM_STEPS`` of it had passed at the first update; ``None`` before that
    """

    done: float = 0.0
    length_is_known: bool = True
    length: float | None = 1.0  # of agents saved before it was kept

    def begin(self, num_timesteps: int, reset_num_timesteps: bool, n_updates: int) -> None:
        """
        At every call of ``learn`` or ``pretrain``.

        :param num_timesteps: Number of steps so far
        :param reset_num_timesteps: As ``learn`` was told
        :param n_updates: Number of updates so far
        """
        if num_timesteps == 0:
            # offline training, however short, has come to its own end
            self.done = min(self.done, n_updates / N_UPDATES)
        if reset_num_timesteps or num_timesteps == 0:
            # from the first call on, learn(..., reset_num_timesteps=False) says that more will come
            self.length_is_known = reset_num_timesteps
            self.length = None

    def factor(self, progress_remaining: float | None, n_updates: int) -> float:
        """
        :param progress_remaining: From 1 to 0; ``None`` of an update that is no part of a training with a length
        :param n_updates: Number of updates so far
        :return: Factor of the temperature in the actor's step, from ``FACTOR`` to 1
        """
        part_done = 0.0
        if self.length_is_known and progress_remaining is not None:
            if self.length is None:
                # where nothing remains, this one update is all of training
                self.length = min((progress_remaining or 1.0) / (1.0 - PART_OF_RANDOM_STEPS), 1.0)
            part_done = (1.0 - progress_remaining / self.length) / PART_OF_TRAINING
        self.done = min(max(self.done, part_done, n_updates / N_UPDATES), 1.0)
        return FACTOR + (1.0 - FACTOR) * self.done
