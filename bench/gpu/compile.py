"""a: everything that the other parts launch, compiled on all cores, into the cache that they share.

Each task launches its kernels on a few rows and steps, on which what is compiled does not depend. A
row says how long it took; what there was no time for, the other parts compile themselves.
"""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch

from bench import harness
from bench.gpu import correct, micro, models, steps
from bench.gpu.launches import Problem, launch_all, stand_in

BENCH = "compile"


def shape(case: steps.Case, h_0: bool, device: torch.device) -> None:
    own = Problem.of(3, 2, case.P, case.Q, case.heads, case.dtype, device)
    state = torch.zeros_like(own.scan.x[0], dtype=torch.float32) if h_0 else None
    own.scan = own.scan._replace(h_0=state)
    launch_all(own)


def variant(kernel: str, P: int, Q: int, setting: dict, device: torch.device) -> None:
    shared = steps.Shared(steps.Case(3, 2, P, Q), device)
    own = shared.case.problem(device)
    shared.made = own, own.scan.x, own.scan.x, own.scan.x  # any: no other kernel is launched
    shared.launch(kernel, **setting)()


def model(kind: str, size: str, device: torch.device) -> None:
    own = models.build(kind, models.SIZES[size], 8, device)
    optimizer = torch.optim.AdamW(own.parameters())
    tokens = torch.zeros(2, 9, dtype=torch.int64, device=device)
    models.backward(own, optimizer, models.forward(own, optimizer, tokens)[0])


def measurement(name: str, device: torch.device) -> None:
    micro.measurements(micro.micro_of(device))[name][0]()


def tasks(quick: bool, device: torch.device, workers: int) -> dict[str, Callable]:
    """What to run, by name, in the order of its worth."""
    found = {
        f"{case.P}x{case.Q}, {case.heads} heads, {case.dtype}": partial(shape, case, False, device)
        for case in steps.cases(quick)
    }
    if quick:
        return found
    for dtype in ("bf16", "fp32"):  # of the long sequences
        case = steps.Case(3, 2, 32, 32, 1, dtype)
        found[f"32x32, h_0, {dtype}"] = partial(shape, case, True, device)
    for i in range(workers):
        found[f"tests {i}"] = partial(correct.run_tests, correct.chosen()[i::workers])
    for kind, size in itertools.product(("kru", "krulstm"), models.SIZES):
        found[f"model {kind} {size}"] = partial(model, kind, size, device)
    for name in micro.measurements(micro.micro_of(device)):
        found[f"micro {name}"] = partial(measurement, name, device)
    for kernel, P, Q, _, settings in steps.VARIANTS:
        for setting in [{}, *settings]:
            words = " ".join(f"{k}={v}" for k, v in setting.items())
            found[f"{kernel} {P}x{Q} {words}"] = partial(variant, kernel, P, Q, setting, device)
    return found


def timed(task: Callable) -> float:
    torch.set_num_threads(1)
    began = time.monotonic()
    with stand_in():
        task()
    return time.monotonic() - began


def run(results: harness.Results, device: torch.device) -> None:
    workers = 1 if results.quick else len(os.sched_getaffinity(0))
    began = time.monotonic()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures = {
        pool.submit(timed, task): name
        for name, task in tasks(results.quick, device, workers).items()
        if not results.is_done(BENCH, name)
    }
    try:
        for future in as_completed(futures, timeout=max(0.1, results.seconds_left())):
            name = futures.pop(future)
            try:
                seconds = future.result()
            except Exception as error:  # what one cannot compile stops no other
                results.add_reason(BENCH, name, "failed", harness.reason_of(error))
                continue
            results.add(BENCH, name, f"{seconds:.1f} s", seconds=seconds)
    except TimeoutError:
        results.left += futures.values()
    pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.monotonic() - began
    results.add(BENCH, "compile", f"{seconds:.1f} s on {workers} cores", seconds=seconds)
