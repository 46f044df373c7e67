"""
Export the deterministic action of a trained agent to ONNX, for deployment without Python, and check it with onnxruntime.

    python examples/export_onnx.py --steps 2000                      # train a little on Pendulum-v1, then export
    python examples/export_onnx.py --model model.zip --out policy.onnx

Needs the extra: pip install -e ".[onnx]"
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_softq import SoftQ


class DeterministicPolicy(nn.Module):
    """
    Observation in the environment's units in, action in the environment's units out, as ``predict(deterministic=True)``.

    :param policy: Policy of an agent with a Box observation space
    :raises ValueError: if observations are no Box
    """

    def __init__(self, policy: BasePolicy):
        super().__init__()
        if not isinstance(policy.observation_space, spaces.Box):
            raise ValueError(f"observation_space={policy.observation_space!r} is not allowed: it must be a Box")
        self.policy = policy.to("cpu")
        self.policy.set_training_mode(False)
        self.action_space = policy.action_space
        if isinstance(self.action_space, spaces.Box):
            self.low, self.high = (th.as_tensor(x).float() for x in (self.action_space.low, self.action_space.high))

    def forward(self, obs: th.Tensor) -> th.Tensor:
        action = self.policy._predict(obs, deterministic=True)
        if not isinstance(self.action_space, spaces.Box):
            return action
        action = action.reshape(-1, *self.low.shape)
        return self.low + 0.5 * (action + 1.0) * (self.high - self.low)


def export(policy: BasePolicy, path: Path) -> None:
    """
    :param policy: Policy of an agent
    :param path: File to write: input ``obs``, shape (batch_size, ...), output ``action``; any batch size
    """
    module = DeterministicPolicy(policy).eval()
    # two of them: the exporter would take 1 for a constant
    obs = th.as_tensor(np.stack([policy.observation_space.sample() for _ in range(2)]))
    th.onnx.export(
        module,
        (obs.float() if obs.is_floating_point() else obs,),
        str(path),
        input_names=["obs"],
        output_names=["action"],
        dynamic_shapes=({0: th.export.Dim("batch_size")},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )


def largest_difference(policy: BasePolicy, path: Path, obs: np.ndarray) -> float:
    """
    :param policy: Policy that was exported
    :param path: The file
    :param obs: Observations, shape (batch_size, ...)
    :return: Largest difference between the actions of onnxruntime and those of ``predict``
    """
    if np.issubdtype(obs.dtype, np.floating):
        obs = obs.astype(np.float32)
    (actions,) = onnxruntime.InferenceSession(str(path)).run(None, {"obs": obs})
    return float(np.abs(actions - policy.predict(obs, deterministic=True)[0]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="trained agent (default: train one)")
    parser.add_argument("--env", default="Pendulum-v1", help="environment to train in without --model")
    parser.add_argument("--steps", type=int, default=5000, help="steps of that training")
    parser.add_argument("--out", type=Path, default=Path("policy.onnx"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    if args.model is None:
        model = SoftQ("MlpPolicy", args.env, device="cpu").learn(args.steps)
    else:
        try:
            model = SoftQ.load(args.model, device="cpu")
        except FileNotFoundError as error:
            parser.error(f"--model {args.model} is not there ({error})")
    export(model.policy, args.out)
    obs = np.stack([model.observation_space.sample() for _ in range(1000)])
    difference = largest_difference(model.policy, args.out, obs)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KB, largest difference of 1000 actions {difference:.1e}")


if __name__ == "__main__":
    main()
