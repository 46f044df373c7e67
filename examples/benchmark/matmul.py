"""Matmuls of a training step: the time spent in them, and the time that this machine needs for them at best."""

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.profiler import ProfilerActivity, profile

# Operators that multiply matrices, and where their two factors stand among the inputs; oneDNN's takes the second transposed
ONEDNN = "mkldnn::_linear_pointwise"
OPERATORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, ONEDNN: 0}
DTYPES = {"float": th.float32, "double": th.float64, "c10::BFloat16": th.bfloat16, "c10::Half": th.float16}


class Matmul(NamedTuple):
    """Type and shapes of the two factors."""

    dtype: str
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def flops(self) -> float:
        return 2.0 * np.prod(self.left, dtype=float) * self.right[-1]


@cache
def peak_seconds(matmul: Matmul, n_threads: int, n_chunks: int = 9) -> float:
    """
    The best time in which this machine computes one matmul, operands warm, by torch's own choice of a library or by oneDNN.
    """
    left, right = (th.ones(shape, dtype=DTYPES[matmul.dtype]) for shape in (matmul.left, matmul.right))
    libraries: list[Callable[[], th.Tensor]] = [lambda: left @ right]
    if left.ndim == 2 and left.dtype == th.float32 and th.backends.mkldnn.is_available():
        transposed = right.mT
        libraries.append(lambda: th.ops.mkldnn._linear_pointwise(left, transposed, None, "none", [], ""))
    return min(_best_seconds(multiply, matmul.flops, n_chunks) for multiply in libraries)


def _best_seconds(multiply: Callable[[], th.Tensor], flops: float, n_chunks: int) -> float:
    multiply()
    # long enough for the clock, short enough to fall between interruptions
    n_calls = int(min(max(2e7 / max(flops, 1.0), 3), 300))
    best = float("inf")
    for _ in range(n_chunks):
        start = time.perf_counter()
        for _ in range(n_calls):
            multiply()
        best = min(best, (time.perf_counter() - start) / n_calls)
    return best


def profile_matmuls(agent: OffPolicyAlgorithm, n_updates: int) -> tuple[Counter[Matmul], float]:
    """The matmuls of some updates, and the seconds spent in them."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        agent.train(n_updates, 256)
    matmuls: Counter[Matmul] = Counter()
    seconds = 0.0
    for event in profiler.events() or []:
        if event.name in OPERATORS:
            i = OPERATORS[event.name]
            left, right = (tuple(shape) for shape in event.input_shapes[i : i + 2])
            right = right[::-1] if event.name == ONEDNN else right
            matmuls[Matmul(event.input_dtypes[i], left, right)] += 1
            seconds += event.self_cpu_time_total * 1e-6
    return matmuls, seconds


def measure_matmuls(agent: OffPolicyAlgorithm, n_threads: int, n_updates: int, repeats: int) -> dict[str, float]:
    """
    The budget of one update. The profiler slows what lies between the matmuls, therefore the update is timed without it.
    """
    update_times, matmul_times = [], []
    matmuls: Counter[Matmul] = Counter()
    for _ in range(repeats):
        start = time.perf_counter()
        agent.train(n_updates, 256)
        update_times.append((time.perf_counter() - start) / n_updates)
        matmuls, seconds = profile_matmuls(agent, n_updates)
        matmul_times.append(seconds / n_updates)
    update, in_matmul = median(update_times), median(matmul_times)
    at_peak = sum(count * peak_seconds(matmul, n_threads) for matmul, count in matmuls.items()) / n_updates
    return dict(
        ms_per_update=update * 1e3,
        ms_in_matmul=in_matmul * 1e3,
        matmul_share=in_matmul / update,
        gflops_in_matmul=sum(count * matmul.flops for matmul, count in matmuls.items()) / n_updates / in_matmul / 1e9,
        peak_share_in_matmul=at_peak / in_matmul,
        peak_share_of_update=at_peak / update,
    )
