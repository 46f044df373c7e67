"""A Ray cluster of two nodes on this machine: a node that dies, and the learning benchmark's runs as tasks."""

import logging
import os

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from tests.test_benchmark_learning import EVAL_FREQ, STEPS, call, read

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from sb3_softq.vec_env import RayVecEnv  # noqa: E402

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster(monkeypatch):
    # Ray's processes would wait for the other tests on busy cores
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def node_of(env):
    return [ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) for actor in env._actors]


@pytest.mark.skipif(os.name == "nt", reason="Ray simulates clusters on Linux and macOS")
def test_a_node_that_dies(cluster, caplog):
    env = make_vec_env(
        "Pendulum-v1",
        n_envs=4,
        seed=0,
        vec_env_cls=RayVecEnv,
        # a CPU for life, so that there is one actor per node
        vec_env_kwargs=dict(address=cluster.address, actor_options={"num_cpus": 1}),
    )
    env.reset()
    head, second = ray.get_runtime_context().get_node_id(), cluster.second.node_id
    nodes = node_of(env)
    assert sorted(nodes) == sorted([head, second])
    lost = nodes.index(second)
    obs = env.step(np.zeros((4, 1)))[0]
    cluster.remove_node(cluster.second, allow_graceful=False)
    # the room that the actor will need
    replacement = cluster.add_node(num_cpus=1)
    with caplog.at_level(logging.WARNING, logger="sb3_softq.vec_env"):
        _, rewards, dones, infos = env.step(np.zeros((4, 1)))
    mine = slice(2 * lost, 2 * lost + 2)
    assert dones.tolist() == [i // 2 == lost for i in range(4)]
    assert (rewards[mine] == 0).all()
    np.testing.assert_array_equal([info["terminal_observation"] for info in infos[mine]], obs[mine])
    assert "died and is started again" in caplog.text
    assert node_of(env)[lost] == replacement.node_id
    assert not env.step(np.zeros((4, 1)))[2].any()
    env.close()


@pytest.mark.skipif(os.name == "nt", reason="Ray simulates clusters on Linux and macOS")
def test_benchmark_on_a_cluster(cluster, tmp_path):
    run = ["run", "--algos", "softq", "--envs", "Pendulum-v1", "--steps", str(STEPS), "--eval-freq", str(EVAL_FREQ)]
    run += ["--set", "learning_starts=100", "train_freq=4", "gradient_steps=1", "--label", "softq"]
    output = call(tmp_path, *run, "--seeds", "3", "4", "--ray", cluster.address, "--logs", "cluster")
    assert output.count("finished after") == 2
    # the same results as of a process here
    call(tmp_path, *run, "--seeds", "3", "--logs", "here")
    here, there = (read(tmp_path / logs / "softq" / "Pendulum-v1" / "3" / "evaluations.csv") for logs in ("here", "cluster"))
    assert [row | {"hours": ""} for row in there] == [row | {"hours": ""} for row in here]
    # the same resume
    output = call(tmp_path, *run, "--seeds", "3", "4", "--ray", cluster.address, "--logs", "cluster")
    assert output.count("finished before, skipped") == 2
