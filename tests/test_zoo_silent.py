"""A worker of a search that is killed before its trial has shown a sign of life."""

import os
import signal
import subprocess
import sys

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from sb3_softq.zoo.storage import begin_silent_trials, shared

WORKER = """
import os, signal, sys
import optuna
from optuna.storages import _heartbeat
from sb3_softq.zoo.storage import shared
url, killed = sys.argv[1:]
if killed == "killed":
    # after the trial was created, before it says that it lives
    _heartbeat.HeartbeatThread.start = lambda self: os.kill(os.getpid(), signal.SIGKILL)
study = shared(optuna.create_study)(url, study_name="shared", load_if_exists=True)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
"""


def worker(url, killed):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKER, url, killed],
        env={**os.environ, "SB3_SOFTQ_HEARTBEAT": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def states(url):
    trials = optuna.load_study(study_name="shared", storage=RDBStorage(url)).get_trials()
    return [trial.state for trial in trials]


@pytest.mark.parametrize("queued", [False, True])
def test_a_worker_that_is_killed_before_its_first_sign_of_life(tmp_path, queued):
    url = f"sqlite:///{tmp_path}/study.db"
    if queued:
        # a trial that waits is taken, not created
        optuna.create_study(storage=url, study_name="shared").enqueue_trial({"x": 0.5})
    assert worker(url, "killed").returncode == -signal.SIGKILL
    assert states(url) == [TrialState.RUNNING]
    survivor = worker(url, "")
    assert survivor.returncode == 0, survivor.stderr
    # its own trial, and that of the dead one again
    assert sorted(states(url)) == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    if queued:
        trials = optuna.load_study(study_name="shared", storage=url).get_trials(states=(TrialState.COMPLETE,))
        assert 0.5 in [trial.params["x"] for trial in trials]


def test_trials_that_live_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SB3_SOFTQ_HEARTBEAT", "60")
    study = shared(optuna.create_study)(f"sqlite:///{tmp_path}/study.db")
    trial = study.ask()
    backend = study._storage._backend
    begin_silent_trials(study)
    begin_silent_trials(study)
    # the worker was only slow to say so
    backend.record_heartbeat(trial._trial_id)
    optuna.storages.fail_stale_trials(study)
    assert [each.state for each in study.get_trials()] == [TrialState.RUNNING]
    # in memory nothing is to be said
    begin_silent_trials(optuna.create_study())
