"""Studies that several machines work on: a worker that dies leaves its trial to the others."""

import os
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState


def heartbeat_seconds() -> int:
    """Seconds between two signs of life of a trial; after three that are missing it is taken for dead."""
    return int(os.environ.get("SB3_SOFTQ_HEARTBEAT", "60"))


class SharedStudy(optuna.Study):
    """A study of several workers: ``optimize`` returns when no trial of any of them is unfinished."""

    def optimize(self, func: Callable[[optuna.Trial], Any], **options: Any) -> None:  # type: ignore[override]
        super().optimize(func, **options)
        # now for the trials of others: they finish, or are queued again
        options = {name: value for name, value in options.items() if name not in ("n_trials", "callbacks")}
        while self.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            begin_silent_trials(self)
            fail_stale_trials(self)
            if self.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                super().optimize(func, n_trials=1, **options)
            else:
                time.sleep(heartbeat_seconds())


def begin_silent_trials(study: optuna.Study) -> None:
    """
    Give the trials that run without having shown a sign of life their first one. A worker that was killed between creating
    its trial and that has left one that Optuna takes for alive for ever; now it is dead when no further sign has followed.

    :param study: On a database
    """
    storage = study._storage
    database = getattr(storage, "_backend", storage)
    if not isinstance(database, RDBStorage):
        return
    # which takes 0.3 seconds of a command that needs no database
    import sqlalchemy

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        with database.engine.connect() as connection:
            query = sqlalchemy.text("SELECT COUNT(*) FROM trial_heartbeats WHERE trial_id = :trial")
            if connection.execute(query, {"trial": trial._trial_id}).scalar() == 0:
                # where the worker is alive and comes first, the database refuses a second one, and Optuna ignores that
                database.record_heartbeat(trial._trial_id)


def shared(create_study: Callable[..., optuna.Study]) -> Callable[..., optuna.Study]:
    """
    :param create_study: ``optuna.create_study``
    :return: The same, but where ``storage`` is a database's URL, trials show signs of life there, and those of dead workers
        are queued again
    """

    def wrapped(storage: Any = None, **kwargs: Any) -> optuna.Study:
        if not isinstance(storage, str) or "://" not in storage:
            return create_study(storage=storage, **kwargs)
        database = RDBStorage(
            storage,
            heartbeat_interval=heartbeat_seconds(),
            grace_period=3 * heartbeat_seconds(),
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        study = create_study(storage=database, **kwargs)
        study.__class__ = SharedStudy
        # now, before the RL Zoo counts those that run against the largest number of trials
        begin_silent_trials(study)
        fail_stale_trials(study)
        return study

    return wrapped
