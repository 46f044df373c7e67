"""A temperature that falls, for algorithms that take a number alone."""

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import Schedule

from sb3_softq import SoftQ


class Cooling(BaseCallback):
    """
    Give SAC and CrossQ the temperatures of a schedule, which SoftQ takes as ``ent_coef``.

    :param schedule: Temperature by the progress that remains
    """

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def _on_step(self) -> bool:
        if not isinstance(self.model, SoftQ):
            temperature = self.schedule(self.model._current_progress_remaining)
            self.model.ent_coef_tensor = th.tensor(temperature)  # type: ignore[attr-defined]
        return True
