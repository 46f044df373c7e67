"""Annealing: the actor starts hotter, the critics do not, and it never gets hotter again."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from sb3_softq import SoftQ
from sb3_softq.annealing import Annealing
from sb3_softq.data import from_agent
from tests.conftest import StopAfter, check_training, flat, small


def test_temperature_and_annealing_end_where_their_schedules_end():
    model = small(ent_coef=LinearSchedule(0.5, 0.1, 1.0), annealing=LinearSchedule(10.0, 1.0, 1.0))
    assert model.ent_coef_tensor.item() == pytest.approx(0.5)
    assert model._annealing() == pytest.approx(10.0)
    check_training(model)
    assert model.ent_coef_tensor.item() == pytest.approx(0.1)
    assert model._annealing() == pytest.approx(1.0)


def test_annealing_reaches_the_actor_only():
    """One update from the same weights on the same data: the factor changes the actor's step, not the critic's."""
    results = []
    for annealing in (1.0, 20.0):
        model = small(ent_coef=0.1, annealing=annealing, learning_starts=1000).learn(20)
        th.manual_seed(0)
        np.random.seed(0)
        model.train(gradient_steps=1, batch_size=8)
        results.append((flat(model.actor), flat(model.critic)))
    assert not th.equal(results[0][0], results[1][0])
    assert th.equal(results[0][1], results[1][1])


def test_annealing_of_a_training_in_many_calls():
    """Nobody knows its length: a function of the updates alone, that the first call does not use up."""
    model = small(ent_coef=0.1, learning_starts=0)
    for n in range(1, 6):
        model.learn(20, reset_num_timesteps=False)
        assert model._n_updates == 20 * n
        assert model._annealing() == pytest.approx(20 - 19 * model._n_updates / 10_000)
    model._n_updates = 20_000
    assert model._annealing() == 1.0


def test_offline_training_does_not_use_up_that_of_what_comes_after_it():
    """However short it is: it had ended where its own few updates did."""
    collected = small(ent_coef=0.1, learning_starts=1000).learn(40)
    model = small(ent_coef=0.1, learning_starts=0).set_data(from_agent(collected)).pretrain(30)
    assert model._annealing() == 1.0
    model.learn(1)
    # the one step that it was told is all of training
    assert model._annealing() == 1.0
    model = small(ent_coef=0.1, learning_starts=0).set_data(from_agent(collected)).pretrain(30)
    model.learn(20, reset_num_timesteps=False)
    assert model._annealing() == pytest.approx(20 - 19 * 50 / 10_000)


@pytest.mark.parametrize("offline", ["pretrain", "clone_behaviour"])
@pytest.mark.parametrize("total", [30, 10**6])
def test_offline_updates_in_the_middle_of_a_training_are_no_part_of_it(offline, total):
    """It goes on as if they had been so many updates more, in the episode that was going on."""
    model = small(ent_coef=0.1, learning_starts=0)
    # whose length is known, and longer than it lasts
    model.learn(total, StopAfter(10))
    before, running = model._annealing(), model.returns.running
    assert before > 1.0
    getattr(model.set_data(from_agent(model)), offline)(20)
    model._current_progress_remaining = 1.0
    assert model._annealing() == pytest.approx(min(before, 20 - 19 * model._n_updates / 10_000))
    assert model.returns.running == running
    model = small(ent_coef=0.1, learning_starts=0).learn(10, reset_num_timesteps=False)
    getattr(model.set_data(from_agent(model)), offline)(20)
    model.learn(10, reset_num_timesteps=False)
    assert model._annealing() == pytest.approx(20 - 19 * model._n_updates / 10_000)


@pytest.mark.parametrize("total", [300, 3_000])
def test_annealing_ends_after_a_third_of_the_training(total):
    model = small(ent_coef=0.1, learning_starts=0)
    model.annealing_clock.begin(0, True, 0)
    for part, factor in ((0.0, 20.0), (1 / 6, 10.5), (0.32, 20 - 19 * 0.96), (0.34, 1.0), (1.0, 1.0)):
        model._update_current_progress_remaining(int(part * total * 100), total * 100)
        assert model._annealing() == pytest.approx(factor, abs=0.02)


def factors_of_updates(monkeypatch):
    """A list that gets the factor of each update to come."""
    factors, factor = [], Annealing.factor
    monkeypatch.setattr(Annealing, "factor", lambda *args: factors.append(factor(*args)) or factors[-1])
    return factors


@pytest.mark.parametrize(("learning_starts", "total"), [(0, 90), (9, 100), (30, 120), (60, 90), (300, 390), (88, 90)])
def test_random_steps_do_not_use_it_up(monkeypatch, learning_starts, total):
    """However many, the actor is annealed as where they are a tenth of training; fewer count as they are."""
    factors = factors_of_updates(monkeypatch)
    model = small(ent_coef=0.1, learning_starts=learning_starts).learn(total)
    n = total - learning_starts
    assert model._n_updates == n
    # the first update comes after a step more
    before = min((learning_starts + 1) / total, 0.1)
    passed = np.linspace(before, 1.0, n)
    assert factors == pytest.approx(20 - 19 * np.minimum(3 * passed, 1), abs=0.01)
    if learning_starts < total - 10:
        assert 14 < factors[0] < 20
        assert factors[len(factors) // 4 - 1] > 1.0


def test_a_training_of_one_update_is_not_hot(monkeypatch):
    factors = factors_of_updates(monkeypatch)
    small(ent_coef=0.1, learning_starts=89).learn(90)
    assert factors == [1.0]


def test_random_steps_of_another_call_are_no_part_of_its_annealing(monkeypatch):
    """The first call was stopped in its annealing: the second, with random steps of its own, does not end it at once."""
    factors = factors_of_updates(monkeypatch)
    model = small(ent_coef=0.1, learning_starts=60)
    model.learn(60 + 301, StopAfter(60 + 11))
    assert len(factors) == 10
    # of 300 steps after the random ones, which count as 300 / 9
    assert factors[-1] == pytest.approx(20 - 19 * 3 * (0.1 + 0.9 * 9 / 300), abs=0.01)
    model.learn(60 + 31)
    assert factors[10] == factors[9]
    assert factors[11] > 10
    assert factors[-21:] == [1.0] * 21


def test_agents_saved_before_keep_their_clock(tmp_path):
    """It counted from the first step, and did not say how much of them count."""
    model = small(ent_coef=0.1, learning_starts=0).learn(301, StopAfter(11))
    del vars(model.annealing_clock)["length"]
    model.save(tmp_path / "model.zip")
    loaded = SoftQ.load(tmp_path / "model.zip", device="cpu")
    assert loaded._annealing() == pytest.approx(20 - 19 * 30 / 301)
    loaded._current_progress_remaining = 1 - 1 / 6
    assert loaded._annealing() == pytest.approx(10.5)


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_annealing_never_rises_again(tmp_path, reset_num_timesteps):
    """The first call says how long training is: what comes after it does not begin anew."""
    model, factors = small(ent_coef=0.1, learning_starts=0), []

    class Record(BaseCallback):
        def _on_step(self):
            factors.append(self.model._annealing())
            return True

    model.learn(30, Record())
    assert factors[0] > 19
    assert factors[-1] == 1.0
    model.save(tmp_path / "model")
    model = SoftQ.load(tmp_path / "model", env=model.get_env(), device="cpu")
    model.learn(30, Record(), reset_num_timesteps=reset_num_timesteps)
    assert len(factors) == 60
    assert sorted(factors, reverse=True) == factors
