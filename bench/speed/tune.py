"""Experiments that only a GPU can decide: what the kernels' launch constants should be.

    python -m bench tune                        # all of them, on the first GPU
    python -m bench tune --case prefetch warps  # some
    TRITON_INTERPRET=1 python -m bench tune --device cpu --quick

Each experiment answers one question, printed with it. The settings are `options.TUNABLE`; rows hold
the same times as `python -m bench kernels`, of the launchers themselves, `setting` and whether it
is the default. Settings take turns. A default is changed in `kernels/options.py` where a row here
shows a better one.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import harness
from bench.harness import Candidate
from kru_triton import kru_scan, unitary_
from kru_triton.kernels import why_not
from kru_triton.ops.arguments import How, Scan

BENCH = "tune"
BOTH = ("forward", "backward")
SMALL = ((16, 16), (32, 32))
NUM_WARPS = [{}, *({"num_warps": n, "maxnreg": None} for n in (1, 2, 4, 8))]


@dataclass
class Problem:
    """What the launchers take, for (B, T) of P·Q complex units and one head."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    beta: torch.Tensor
    precision: str

    @classmethod
    def of(cls, B, T, P, Q, device, dtype=torch.bfloat16):
        torch.manual_seed(0)
        a, b = (unitary_(torch.empty(2, 1, side, side, device=device)) for side in (P, Q))
        return cls(
            torch.randn(B, T, 2 * P * Q, device=device, dtype=dtype),
            a,
            b,
            0.02 * torch.randn(P * Q, device=device),
            "bf16" if dtype == torch.bfloat16 else "fp32",
        )

    @property
    def bags(self) -> tuple[Scan, How]:
        scan = Scan(self.x.transpose(0, 1), self.a, self.b, self.beta)
        return scan, How("modrelu", precision=self.precision)

    def forward(self, **tuning):
        from kru_triton.kernels import scan  # imports triton

        return scan.scan_forward(*self.bags, **tuning)

    def backward(self, h, dh, **tuning):
        from kru_triton.kernels import scan

        return scan.scan_backward(dh, None, h, *self.bags, **tuning)[0]

    def weight_grad(self, dx, h, **tuning):
        from kru_triton.kernels import weight_grad

        return weight_grad.weight_grad(dx, h, *self.bags, **tuning)


@dataclass
class Bench:
    """The experiments' common arguments."""

    results: harness.Results
    device: torch.device
    quick: bool

    def sizes(self, *full):
        """A toy number in a quick run."""
        return [min(full[0], 5)] if self.quick else list(full)

    @property
    def length(self) -> int:
        return 4 if self.quick else 1024

    @property
    def processors(self) -> int:
        if self.device.type != "cuda":
            return 1
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def race(self, case: str, kernel: str, B: int, P: int, Q: int, settings: list[dict]) -> None:
        """Time `kernel` with each of the settings; {} is the default. Results must agree."""
        shared = {}

        def problem():
            if not shared:
                own = Problem.of(B, self.length, P, Q, self.device)
                h = own.forward()
                dh = torch.randn_like(h)
                dx = own.backward(h, dh)
                shared.update(problem=own, h=h, dh=dh, dx=dx)
            return shared

        def run(setting):
            p = problem()
            own = p["problem"]
            if kernel == "forward":
                return own.forward(**setting)
            if kernel == "backward":
                return own.backward(p["h"], p["dh"], **setting)
            return torch.cat([g.flatten() for g in own.weight_grad(p["dx"], p["h"], **setting)])

        def candidate(setting):
            def prepare():
                expected, actual = run({}).float(), run(setting).float()
                error = ((actual - expected).norm() / expected.norm()).item()
                if not error < 1e-2:
                    raise AssertionError(f"differs from the default by {error:.1e}")
                return lambda: run(setting), None

            name = ",".join(f"{k}={v}" for k, v in setting.items()) or "default"
            values = {"kernel": kernel, "B": B, "T": self.length, "P": P, "Q": Q,
                      "setting": setting, "default": not setting}  # fmt: skip
            # a setting that does not compile, or not to the same result, is an answer too
            return Candidate(name, prepare, bool(setting), (kernel,), values)

        def describe(candidate, direction, times):
            per_step = 1e3 * times["ms_p50"] / self.length
            passes = {"forward": 2, "backward": 3, "weight_grad": 2}[kernel]
            moved = passes * 2 * P * Q * 2 * B * self.length
            rate = moved / (times["ms_p50"] / 1e3)
            line = f"{per_step:8.3f} us/step  {rate / 1e9:8.1f} GB/s"
            return line, {"us_per_step": per_step, "gb_per_s": rate / 1e9}

        harness.race(
            self.results,
            BENCH,
            f"{case} B{B}-T{self.length}-{P}x{Q}",
            [candidate(setting) for setting in (settings[:2] if self.quick else settings)],
            self.device,
            describe,
            rounds=1 if self.quick else 20,
        )
        shared.clear()
        harness.free_memory(self.device)

    def sweep(self, case, shapes, rows, settings=({},), kernels=BOTH, toy=(4, 4)) -> None:
        """Race the settings for each shape, number of rows and kernel.

        Args:
            rows: negative ones are per processor of the device.
            toy: the shape of a quick run.
        """
        for P, Q in shapes:
            for B in self.sizes(*(B if B > 0 else -B * self.processors for B in rows)):
                for kernel in kernels:
                    self.race(case, kernel, B, *(toy if self.quick else (P, Q)), list(settings))


def chain_kernel():
    """Products that wait for one another, in CHAINS that do not; their sums begin apart, since
    the compiler would make one of equal ones."""
    import triton
    import triton.language as tl

    @triton.jit
    def chain(p_out, steps, CHAINS: tl.constexpr):
        i = tl.arange(0, 16)
        a = (i[:, None] == i[None, :]).to(tl.bfloat16)
        acc = tl.zeros((16, 16), tl.float32)
        acc2 = acc + 1.0
        acc3 = acc + 2.0
        acc4 = acc + 3.0
        for _ in range(steps):
            acc = tl.dot(a, a, acc)
            if CHAINS > 1:
                acc2 = tl.dot(a, a, acc2)
                acc3 = tl.dot(a, a, acc3)
                acc4 = tl.dot(a, a, acc4)
        out = acc + acc2 + acc3 + acc4
        tl.store(p_out + tl.program_id(0) * 256 + i[:, None] * 16 + i[None, :], out)

    return chain


def mma(bench: Bench) -> None:
    """How long does a 16x16x16 bfloat16 product take one warp, alone and beside others?"""
    chain = chain_kernel()
    steps = 4 if bench.quick else 20000
    for warps, chains in itertools.product(bench.sizes(1, 4, 8, 16), (1, 4)):
        programs = bench.processors * warps
        out = torch.empty(programs, 16, 16, device=bench.device)

        def prepare(programs=programs, chains=chains, out=out):
            def run():
                chain[(programs,)](out, steps, CHAINS=chains, num_warps=1)

            run()
            if not (out.diagonal(dim1=1, dim2=2) == steps * chains + 6).all():
                raise AssertionError("the chain of products is wrong")
            return run, None

        def describe(candidate, direction, times, chains=chains):
            each = 1e6 * times["ms_p50"] / steps / chains
            return f"{each:8.2f} ns per product of one warp", {"ns_per_product": each}

        harness.race(
            bench.results,
            BENCH,
            f"mma {warps} warps per processor, {chains} chains",
            [Candidate("triton", prepare, baseline=False, directions=("product",))],
            bench.device,
            describe,
            rounds=2 if bench.quick else 10,
        )


def latency(bench: Bench) -> None:
    """What is a step's latency, and does it stay until every subpartition has a warp?"""
    bench.sweep("latency", SMALL, (1, -1, -2, -4, -8))


def prefetch(bench: Bench) -> None:
    """Which fetch-ahead keeps memory busy, at the rows where memory begins to be the limit?"""
    settings = [{}, *({"PREFETCH": n} for n in (0, 2, 4, 8)), {"AHEAD": True}, {"AHEAD": False}]
    bench.sweep("prefetch", SMALL, (300, 512, 1024, 2048), settings)


def tf32(bench: Bench) -> None:
    """Does a tf32 product truncate its operands, or round them? (Triton hands over raw bits.)"""
    import triton
    import triton.language as tl

    @triton.jit
    def product(p_x, p_out):
        i = tl.arange(0, 16)
        o = i[:, None] * 16 + i[None, :]
        eye = (i[:, None] == i[None, :]).to(tl.float32)
        tl.store(p_out + o, tl.dot(tl.load(p_x + o), eye, input_precision="tf32"))

    name = "tf32 truncation"
    if bench.results.is_done(BENCH, name):
        return
    x = torch.rand(16, 16, device=bench.device) + 1
    out = torch.empty_like(x)
    product[(1,)](x, out, num_warps=1)
    bits = x.view(torch.int32)
    cut = (bits & ~0x1FFF).view(torch.float32)
    near = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    answer = next(
        (
            word
            for word, expected in (("exact", x), ("truncated", cut), ("rounded", near))
            if torch.equal(out, expected)
        ),
        "neither",
    )
    bench.results.add(BENCH, name, f"operands are {answer}", answer=answer)


def occupancy(bench: Bench) -> None:
    """Do fewer registers, hence more warps per processor, pay at 32x32?"""
    settings = [{}, {"BETA_IN_LOOP": True}, {"BETA_IN_LOOP": False}, {"AHEAD": True},
                {"maxnreg": 128}, {"maxnreg": 168}]  # fmt: skip
    bench.sweep("occupancy", [(32, 32)], (512, 2048), settings)


def warps(bench: Bench) -> None:
    """Is one warp per program still right beyond 32x32?"""
    bench.sweep("warps", ((32, 32), (32, 64), (64, 64)), (64, 512), NUM_WARPS)


def fused(bench: Bench) -> None:
    """From how many rows would weight gradients inside the adjoint's loop pay at 16x16?"""
    name = "fused weight gradient"
    if not bench.results.is_done(BENCH, name):
        reason = (
            "there is no fused kernel; the experiment weights says what it could save: a fused one "
            "reads h and dx no second time"
        )
        bench.results.add_reason(BENCH, name, "skipped", reason)
    bench.sweep("fused", [(16, 16)], (64, 128, 256, 512), kernels=("backward", "weight_grad"))


def weights(bench: Bench) -> None:
    """How many warps, and programs that share the rows of dA or dB, for the weight gradient?"""
    shared = [{}, *({"SLICES": n} for n in (1, 2, 4)), {"num_warps": 4}, {"num_warps": 8}]
    only = ("weight_grad",)
    bench.sweep("weights", (*SMALL, (16, 32)), (256, 1024), NUM_WARPS, only)
    # dA and dB are apart
    bench.sweep("weights", ((32, 64), (64, 64)), (64, 256), shared, only, toy=(4, 64))


def wide(bench: Bench) -> None:
    """Which blocks of a streamed factor, how deep a pipeline, how many warps?"""
    settings = [{}, *({"BLOCK": n} for n in (32, 64)), *({"num_stages": n} for n in (2, 4)),
                *({"num_warps": n} for n in (4, 8))]  # fmt: skip
    bench.sweep("wide", ((256, 16), (2, 512)), (64, 512), settings, toy=(256, 1))


def accuracy(bench: Bench) -> None:
    """How far are states and gradients from float64, the factors rounded as the kernels do?"""
    T = 4 if bench.quick else 1024
    for (P, Q), dtype in itertools.product(
        ((4, 4),) * 2 if bench.quick else SMALL, (torch.float32, torch.bfloat16)
    ):
        if bench.device.type == "cpu" and dtype == torch.bfloat16:
            continue  # triton's interpreter computes bfloat16 wrongly
        own = Problem.of(4, T, P, Q, bench.device, dtype)
        name = f"accuracy B4-T{T}-{P}x{Q}-{own.precision}"
        if bench.results.is_done(BENCH, name):
            continue
        h = own.forward()
        dh = torch.randn_like(h)
        dx = own.backward(h, dh)
        a, b = own.a, own.b
        if own.precision == "bf16":
            a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        x = own.x.double().requires_grad_()
        h64, _ = kru_scan(x, [a.double(), b.double()], own.beta.double(), backend="torch")
        (dx64,) = torch.autograd.grad(h64, x, dh.transpose(0, 1).double())
        errors = {
            key: ((mine.transpose(0, 1).double() - exact).norm() / exact.norm()).item()
            for key, mine, exact in (("h", h, h64), ("dx", dx, dx64))
        }
        limit = (0.3 if own.precision == "bf16" else 5e-3, 1.0)
        line = f"relative error of h {errors['h']:.1e}, of dx {errors['dx']:.1e}"
        if errors["h"] <= limit[0] and errors["dx"] <= limit[1]:
            bench.results.add(BENCH, name, line, errors=errors)
        else:
            bench.results.add_reason(BENCH, name, "failed", line, errors=errors)


def shared(bench: Bench) -> None:
    """Do warps that read the factors from shared memory every step get in each other's way?"""
    settings = [{}, {"ANCHORED": True, "maxnreg": 255}]
    bench.sweep("shared", [(32, 32)], (-1, -4, -8, -16), settings, ("forward",))


EXPERIMENTS: dict[str, Callable[[Bench], None]] = {
    f.__name__: f
    for f in (
        latency,
        prefetch,
        accuracy,
        warps,
        weights,
        wide,
        occupancy,
        shared,
        mma,
        tf32,
        fused,
    )
}


def main(argv: list[str] | None = None) -> int:
    def run(results, experiment, options, device):
        name = experiment.__name__
        results.title(f"{name}: {experiment.__doc__.strip()}")
        if reason := unavailable(device, options.quick):
            results.add_reason(BENCH, name, "skipped", reason)
        else:
            experiment(Bench(results, device, options.quick))

    return harness.cases_main(__doc__, BENCH, argv, lambda options, device: EXPERIMENTS, run)


def unavailable(device: torch.device, quick: bool) -> str | None:
    if device.type == "cpu" and not (quick and why_not.interpreted()):
        return "needs a GPU; its code runs with TRITON_INTERPRET=1 --device cpu --quick"
    x, w = torch.empty(1, 1, 32, device=device), torch.empty(2, 1, 4, 4, device=device)
    return why_not.why_not(x, w, w, nonlinearity="modrelu", precision="fp32")
