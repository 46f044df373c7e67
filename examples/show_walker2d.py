"""
Show the trained agent that comes with the repository: the actor alone, 100,000 steps of Walker2d-v4.

    python examples/show_walker2d.py                    # without a screen: MUJOCO_GL=egl python ...

It prints the return of ten episodes and films the first one as examples/results/walker2d.gif. ``--model`` extracts the actor
of another agent first, which replaces the one that was there.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy

from sb3_softq import SoftQ
from sb3_softq.actor import SamplingActor

RESULTS = Path(__file__).parent / "results"
FPS, SECONDS, SIZE = 25, 6, 240
N_EPISODES = 10


def film(actor: BasePolicy, env: gym.Env, seed: int) -> list[Any]:
    """
    :param actor: Who acts
    :param env: Environment that renders
    :param seed: Seed of the episode
    :return: Frames, ``FPS`` per second of simulated time
    """
    stride = round(env.metadata["render_fps"] / FPS)
    frames = []
    obs, _ = env.reset(seed=seed)
    for step in range(stride * FPS * SECONDS):
        if step % stride == 0:
            frames.append(env.render())
        obs, _, terminated, truncated, _ = env.step(actor.predict(obs, deterministic=True)[0])
        if terminated or truncated:
            break
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a saved SoftQ agent whose actor is to be shown")
    parser.add_argument("--actor", type=Path, default=RESULTS / "walker2d_actor.zip", help="default: %(default)s")
    parser.add_argument("--gif", type=Path, default=RESULTS / "walker2d.gif", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=10_001, help="seed of the first episode (default: %(default)s)")
    args = parser.parse_args()
    if args.model:
        agent = SoftQ.load(args.model, device="cpu")
        agent.ema_actor.save(str(args.actor))
        actor: BasePolicy = agent.policy
    else:
        # an actor alone has no critics that would choose one of its actions
        actor = SamplingActor.load(str(args.actor), device="cpu")

    warnings.filterwarnings("ignore", message=".*is out of date")
    # at once: ten observations take little longer than one
    envs = make_vec_env("Walker2d-v4", N_EPISODES)
    for name, deterministic in (("deterministic", True), ("stochastic", False)):
        envs.seed(args.seed)
        returns, _ = evaluate_policy(actor, envs, N_EPISODES, deterministic, return_episode_rewards=True)
        print(f"{name} actions, {N_EPISODES} episodes: {np.mean(returns):,.0f} ± {np.std(returns):,.0f}")

    from PIL import Image

    env = gym.make("Walker2d-v4", render_mode="rgb_array", camera_name="track", width=SIZE, height=SIZE)
    first, *others = [Image.fromarray(frame).quantize(128) for frame in film(actor, env, args.seed)]
    first.save(args.gif, save_all=True, append_images=others, duration=1000 // FPS, loop=0, optimize=True)
    print(f"{args.gif}: {args.gif.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
