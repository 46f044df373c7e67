"""Signals that would end a process while it trains, put off until the agent can be saved."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_softq.checkpointing.env_state import CALL
from sb3_softq.faults import evaluation_envs

# Those that end a process whose program does not know them, and what such a program has for them; Windows has no SIGHUP
HANDLERS: dict[int, Any] = {
    getattr(signal, name): handler
    for name, handler in (
        ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),
        ("SIGINT", signal.default_int_handler),
    )
    if hasattr(signal, name)
}
# That the process of an environment has after SIGTERM
SECONDS_LEFT = 5
MESSAGE = (
    b"\nCtrl-C: training ends after the rollout, evaluation or save that is going on. Ctrl-C again ends it without a save.\n"
)
# In the process of an environment: handlers that have been replaced there, by their signal
_replaced: dict[int, Any] = {}


def _outlive_signals(env: Any) -> None:
    """
    In the process of an environment: the rollout that is going on needs it, and it ends with the training's process. Handlers
    that the environment has set stay.
    """
    own = {signal.SIGINT: signal.SIG_IGN} | ({signal.SIGTERM: _end_later} if hasattr(signal, "SIGALRM") else {})
    for number, handler in own.items():
        before = signal.getsignal(number)
        if before in (signal.SIG_DFL, signal.default_int_handler):
            _replaced[number] = before
            signal.signal(number, handler)


def _end_later(number: int, frame: FrameType | None) -> None:
    # a second one ends it at once, as when Python ends the processes that it has started
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(SECONDS_LEFT)


def _end_by_signals(env: Any) -> None:
    """As it was before :func:`_outlive_signals`."""
    while _replaced:
        signal.signal(*_replaced.popitem())


class Interruption:
    """Remembers that a process is to end, from :meth:`watch` to :meth:`release`."""

    def __init__(self) -> None:
        #: Signal that has come
        self.number: int | None = None
        self._watched: list[int] = []
        self._model: OffPolicyAlgorithm | None = None
        # of training and of evaluations
        self._environments: list[VecEnv] = []

    def watch(self, model: OffPolicyAlgorithm, callback: Any = None) -> None:
        """
        Take the place of the handlers that would end the process at once; those that the program has set stay.

        :param model: Which trains
        :param callback: What ``learn`` was given, whose evaluations have environments too
        """
        self.number, self._model = None, model
        env = model.get_env()
        self._environments = [*([] if env is None else [env]), *evaluation_envs(callback)]
        if threading.current_thread() is not threading.main_thread():
            return
        self._watched = [number for number, handler in HANDLERS.items() if signal.getsignal(number) is handler]
        for number in self._watched:
            signal.signal(number, self._on_signal)
        if {signal.SIGINT, signal.SIGTERM} <= set(self._watched):
            # the system, or a terminal, signals to all processes
            self._tell_environments(_outlive_signals)

    def _tell_environments(self, what: Callable[[Any], None]) -> None:
        for env in self._environments:
            workers = env.unwrapped
            if isinstance(workers, SubprocVecEnv) and not workers.waiting and not workers.closed:
                # one that has ended will be told of by a step
                with suppress(EOFError, OSError):
                    workers.env_method(CALL, what)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # whoever does not want to wait has to ask twice
            signal.signal(number, signal.default_int_handler)
        while frame is not None:
            if frame.f_code is OffPolicyAlgorithm.learn.__code__ and frame.f_locals["self"] is self._model:
                self.number = number
                if number == signal.SIGINT:
                    # print() is not made to be interrupted by itself
                    with suppress(OSError):
                        os.write(2, MESSAGE)
                return
            frame = frame.f_back
        # training ended by an error that no callback was told of
        signal.signal(number, HANDLERS[number])
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)

    def release(self) -> None:
        """Give the signals back."""
        for number in self._watched:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, HANDLERS[number])
        if {signal.SIGINT, signal.SIGTERM} <= set(self._watched):
            self._tell_environments(_end_by_signals)
        self._watched = []

    def end_process(self) -> None:
        """
        End the process if a signal has come; nothing happens otherwise.

        :raises KeyboardInterrupt: after Ctrl-C, for which the system's status is 130
        :raises SystemExit: after another signal, with the status that is usual for it
        """
        number, self.number = self.number, None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number is not None:
            raise SystemExit(128 + number)
