"""Two workers on one study in PostgreSQL, one of which is killed."""

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState

from sb3_softq.zoo.storage import shared

N_TRIALS = 3
pytestmark = pytest.mark.cluster


def program(name):
    found = shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)
    if found is None:
        pytest.fail("needs PostgreSQL: apt-get install postgresql")
    return found


@pytest.fixture
def database(tmp_path_factory):
    """URL of a PostgreSQL server of its own. It does not run as root: then it belongs to Debian's user postgres."""
    folder = tmp_path_factory.mktemp("postgres")
    as_user = []
    if os.geteuid() == 0:
        as_user = ["runuser", "-u", "postgres", "--"]
        # the user has to reach it
        shutil.chown(folder, "postgres")
        for parent in [folder, *folder.parents][:4]:
            parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    quiet = dict(check=True, stdout=subprocess.DEVNULL, cwd="/")
    subprocess.run([*as_user, program("initdb"), "-D", data, "-U", "softq", "--auth=trust"], **quiet)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    subprocess.run([*as_user, program("pg_ctl"), "-D", data, "-w", "-l", folder / "log", "-o", options, "start"], **quiet)
    yield f"postgresql+psycopg://softq@127.0.0.1:{port}/postgres"
    subprocess.run([*as_user, program("pg_ctl"), "-D", data, "-m", "immediate", "stop"], **quiet)


def worker(url, folder):
    command = [sys.executable, "-W", "ignore", "-m", "sb3_softq.zoo", "train", "--algo", "softq", "--env", "Pendulum-v1"]
    command += ["-n", "200", "-f", str(folder), "-optimize", "--max-total-trials", str(N_TRIALS), "--n-evaluations", "1"]
    command += ["--eval-episodes", "1", "--storage", url, "--study-name", "shared", "--no-optim-plots", "--pruner", "none"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SB3_SOFTQ_HEARTBEAT": "1"}
    with (folder / f"worker-{time.monotonic_ns()}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_killed_worker_leaves_its_trial_to_the_other(database, tmp_path):
    victim = worker(database, tmp_path)
    storage = optuna.storages.RDBStorage(database)

    def running():
        names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
        trials = names and optuna.load_study(study_name="shared", storage=storage).get_trials(states=(TrialState.RUNNING,))
        # a trial is running before its parameters have been drawn one by one
        return [trial for trial in trials if "learning_rate" in trial.params]

    wait_for(running, 180)
    (interrupted,) = running()
    survivor = worker(database, tmp_path)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert survivor.wait(timeout=400) == 0, "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))

    trials = optuna.load_study(study_name="shared", storage=storage).get_trials()
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    failed = [trial for trial in trials if trial.state is TrialState.FAIL]
    # all trials, each once: the interrupted one again, with the same parameters
    assert len(complete) == N_TRIALS
    assert [trial.number for trial in failed] == [interrupted.number]
    assert len(trials) == N_TRIALS + 1
    assert len({trial.params["learning_rate"] for trial in complete}) == N_TRIALS
    assert failed[0].params["learning_rate"] in {trial.params["learning_rate"] for trial in complete}


def test_a_dead_trial_does_not_count_against_the_number_of_trials(tmp_path, monkeypatch):
    """The RL Zoo counts those that run, and would begin none when the last one's worker has died."""
    monkeypatch.setenv("SB3_SOFTQ_HEARTBEAT", "1")

    def join():
        return shared(optuna.create_study)(storage=f"sqlite:///{tmp_path}/study.db", study_name="shared", load_if_exists=True)

    study = join()
    dead = study.ask()
    study._storage.record_heartbeat(dead._trial_id)
    alive = study.ask()
    time.sleep(4)
    study._storage.record_heartbeat(alive._trial_id)
    states = [trial.state for trial in join().get_trials()]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
