"""
The RL Zoo with soft Q-learning: ``python -m sb3_softq.zoo train --algo softq --env Walker2d-v4``.

Importing this package registers the algorithm, for those who call the RL Zoo from a script of their own:

    import sb3_softq.zoo
    from rl_zoo3.train import train  # with --algo softq -conf sb3_softq.zoo.tuned
"""

from pathlib import Path
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_softq.discrete import DiscreteSoftQ
from sb3_softq.softq import SoftQ

try:
    import rl_zoo3
    from rl_zoo3 import hyperparams_opt
except ImportError as error:
    raise ImportError('sb3_softq.zoo needs the RL Zoo: pip install "sb3-softq[zoo]"') from error

from sb3_softq.zoo import untrusted
from sb3_softq.zoo.search import convert_softq_params, sample_softq_params

HYPERPARAMS = Path(__file__).parent / "hyperparams"


class ZooSoftQ(SoftQ):
    """``softq`` of the RL Zoo: a :class:`SoftQ` or, where actions are Discrete, a :class:`DiscreteSoftQ`."""

    def __new__(cls, policy: Any = None, env: Any = None, **kwargs: Any) -> BaseAlgorithm:  # type: ignore[misc]
        if policy == "MlpPolicy" and isinstance(env.observation_space, spaces.Dict):
            # the RL Zoo's default for environments that softq.yml does not have
            policy = "MultiInputPolicy"
        return (DiscreteSoftQ if isinstance(env.action_space, spaces.Discrete) else SoftQ)(policy, env, **kwargs)

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load whichever of the two the file holds, or which fits the environment if the file is not trusted."""
        if "custom_objects" in kwargs:
            # enjoy and record_video, where the RL Zoo spares its own algorithms the replay buffer of training
            kwargs = {"buffer_size": 1} | kwargs
        if untrusted.state.distrusts:
            env = kwargs.setdefault("env", untrusted.state.env)
            algorithm = DiscreteSoftQ if env is not None and isinstance(env.action_space, spaces.Discrete) else SoftQ
            return algorithm.load(path, *args, **{**kwargs, "trusted": False})
        data, _, _ = load_from_zip_file(path, device="cpu", load_data=True)
        assert data is not None
        return (DiscreteSoftQ if isinstance(data["action_space"], spaces.Discrete) else SoftQ).load(path, *args, **kwargs)


def register() -> None:
    """Make ``--algo softq`` known to every command of the RL Zoo in this process."""
    rl_zoo3.ALGOS["softq"] = ZooSoftQ
    hyperparams_opt.HYPERPARAMS_SAMPLER["softq"] = sample_softq_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["softq"] = convert_softq_params


register()
