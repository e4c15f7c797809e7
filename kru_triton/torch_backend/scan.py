"""The `torch` backend: the recurrence and its written-out adjoint in plain PyTorch operations.

    forward    z_t = A X_{t-1} Bᵀ + u_t,  h_t = σ(z_t)
    adjoint    g_t = dh_t + Aᴴ G_{t+1} conj(B),  G_t = σ'(z_t)ᵀ g_t = du_t
    weights    dA = Σ G_t (X_{t-1} Bᵀ)ᴴ,  dB = Σ (Aᴴ G_t)-contracted with X_{t-1}
    gates      X_{t-1} = gate_t ⊙ h_{t-1};  with Y_t = Aᴴ G_t conj(B),
               g_{t-1} = dh_{t-1} + conj(gate_t) ⊙ Y_t,  dgate_t = Y_t ⊙ conj(h_{t-1})
               (its real part where the gate is real)

Only h is saved. Gradients follow PyTorch's convention (dL/dRe + i·dL/dIm).

Memory plan. Inside, a state is `(H, B, P, c, Q)`: row p, then real and imaginary part, then column
q. In that order `X Bᵀ` is one product with a real `(cQ, cQ)` block matrix and `A V` one with a
`(cP, cP)` block matrix, and nothing is ever permuted between them. Time is cut into chunks that
stay in the cache: a chunk of inputs is copied in and a chunk of results out at once, so a time step
is two matrix products and the nonlinearity, all in place on views that are made once per call.
A head of few units is one product with A ⊗ B, which then stands as B beside a 1×1 A.
With tokens, the rows of a chunk are looked up as it is copied in. Rows of different length are
sorted by length: in each interval between two lengths, only the rows that still run are computed.

B batch, T time, H heads, c parts (2 complex, 1 real), P, Q sizes of A and B, F = c·H·P·Q features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kru_triton.kronecker import as_one_matrix
from kru_triton.nonlinearity import PHASE_NONLINEARITIES, tiny
from kru_triton.ops.arguments import How, Scan, steps_and_rows
from kru_triton.torch_backend.rows import (
    by_length,
    descending,
    in_order,
    interval,
    intervals,
    last_state,
)

CHUNK_BYTES = 1 << 20  # per chunk buffer; half of the L2 cache of a current server core
DENSE_UNITS = 64  # heads of no more are one product a step: two small ones take longer
CHUNK_STEPS = 64  # views of a chunk's steps cost more to make than chunks to begin


def left_block(a: Tensor) -> Tensor:
    """The real matrix `(H, P·c, P·c)` of V -> A V on rows (p, part), from planar `(c, H, P, P)`."""
    if a.shape[0] == 1:
        return a[0]
    real, imag = a
    rows = torch.stack((torch.stack((real, -imag), -1), torch.stack((imag, real), -1)), 2)
    return rows.reshape(a.shape[1], 2 * a.shape[2], 2 * a.shape[3])


def left_block_grad(d: Tensor, parts: int) -> Tensor:
    """The gradient of planar `a` from that of its `left_block`."""
    if parts == 1:
        return d[None]
    d = d.view(d.shape[0], d.shape[1] // 2, 2, d.shape[2] // 2, 2)
    return torch.stack((d[:, :, 0, :, 0] + d[:, :, 1, :, 1], d[:, :, 1, :, 0] - d[:, :, 0, :, 1]))


def right_block(b: Tensor) -> Tensor:
    """The real matrix `(H, c·Q, c·Q)` of X -> X Bᵀ on columns (part, q), from planar `b`."""
    if b.shape[0] == 1:
        return b[0].transpose(-1, -2).contiguous()
    real, imag = b.transpose(-1, -2)
    return torch.cat((torch.cat((real, imag), -1), torch.cat((-imag, real), -1)), -2)


def right_block_grad(d: Tensor, parts: int) -> Tensor:
    """The gradient of planar `b` from that of its `right_block`."""
    if parts == 1:
        return d.transpose(-1, -2)[None].contiguous()
    q = d.shape[-1] // 2
    real = d[:, :q, :q] + d[:, q:, q:]
    imag = d[:, :q, q:] - d[:, q:, :q]
    return torch.stack((real, imag)).transpose(-1, -2).contiguous()


def _merged(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a large head; of a small one a 1×1 identity and A ⊗ B."""
    small = a.shape[-1] > 1 and a.shape[-1] * b.shape[-1] <= DENSE_UNITS
    return as_one_matrix(a, b) if small else (a, b)


def _merged_grad(d: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of planar `a` and `b` from D, that of A ⊗ B: D conj(B) and D conj(A), summed."""
    p, q = a.shape[-1], b.shape[-1]
    d = d.view(*a.shape[:2], p, q, p, q)
    da = torch.einsum("chpqrs,khqs->ckhpr", d, b)
    db = torch.einsum("chpqrs,khpr->ckhqs", d, a)
    if a.shape[0] == 1:
        return da[0], db[0]
    da, db = (torch.stack((x[0, 0] + x[1, 1], x[1, 0] - x[0, 1])) for x in (da, db))
    return da, db


class _Step:
    """Sizes, constants, chunk buffers and their per-step views for one call."""

    def __init__(self, h: Tensor, a: Tensor, b: Tensor):
        self.parts, self.heads, self.p = a.shape[:3]
        self.q = b.shape[-1]
        self.time, self.batch, features = h.shape
        self.dtype, self.device = a.dtype, a.device
        step_bytes = max(1, self.batch * features) * self.dtype.itemsize
        self.chunk = max(1, min(self.time, CHUNK_STEPS, CHUNK_BYTES // step_bytes))
        self.has_left = self.p > 1  # a 1×1 A is the identity: B is then the whole matrix
        self.right = right_block(b)
        if self.has_left:
            left = left_block(a)[:, None].expand(-1, self.batch, -1, -1)
            # one small product per (head, row): stride 0 over rows, a copy only with several heads
            self.left = left.reshape(-1, *left.shape[2:])

    def buffer(self, slots: int) -> Tensor:
        """An empty `(slots, H, B, P, c, Q)` buffer."""
        shape = (slots, self.heads, self.batch, self.p, self.parts, self.q)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """Per slot the view `(H, B·P, c·Q)` that multiplies `right`."""
        return list(buffer.view(buffer.shape[0], self.heads, -1, self.parts * self.q).unbind(0))

    def blocks(self, buffer: Tensor) -> list[Tensor]:
        """Per slot the view `(H·B, P·c, Q)` that `left` multiplies."""
        shape = (buffer.shape[0], self.heads * self.batch, self.p * self.parts, self.q)
        return list(buffer.view(shape).unbind(0))

    def by_head(self, buffer: Tensor) -> Tensor:
        """`(H, slots·B·P, c·Q)`: all rows of each head (a view with one head)."""
        rows = buffer.view(buffer.shape[0], self.heads, -1, self.parts * self.q)
        return rows.transpose(0, 1).reshape(self.heads, -1, self.parts * self.q)

    def planar(self, x: Tensor) -> Tensor:
        """`(T, B, F)` of any strides as the permuted view `(T, H, B, P, c, Q)`."""
        shape = (x.shape[0], self.batch, self.parts_of(x), self.heads, self.p, self.q)
        return x.view(shape).permute(0, 3, 1, 4, 2, 5)

    def parts_of(self, x: Tensor) -> int:
        """The parts of planar `(…, F)`: those of states, or 1 of real gates."""
        return x.shape[-1] // (self.heads * self.p * self.q)

    def load(self, slots: Tensor, x: Tensor) -> None:
        """Copy `(T, B, F)` into T slots; part by part, on a CPU twice as fast as at once. A real
        gate goes into both, so that products with it are those of whole slots."""
        x = self.planar(x)
        for k in range(self.parts):
            slots[..., k, :].copy_(x[..., min(k, x.shape[-2] - 1), :])

    def chunks(self):
        """The pairs (start, end) of all chunks in time order."""
        return [(t, min(t + self.chunk, self.time)) for t in range(0, self.time, self.chunk)]

    def units(self, per_unit: Tensor) -> Tensor:
        """A `(H·N,)` parameter as `(H, 1, P, 1, Q)`, to broadcast against a slot."""
        return per_unit.to(self.dtype).view(self.heads, 1, self.p, 1, self.q)

    def cut(self, reset: Tensor | None):
        """`(T, 1, B, 1, 1, 1)` True where a state is cut, and the list of steps where any is."""
        if reset is None:
            return None, [False] * self.time
        mask = reset.contiguous().view(self.time, 1, self.batch, 1, 1, 1)
        return mask, reset.any(1).tolist()


def forward(scan: Scan, how: How) -> tuple[Tensor, Tensor]:
    """h `(T, B, F)` in the dtype of x, and h_n `(B, F)`, its last rows, in that of a."""
    time, batch = steps_and_rows(scan)
    x, lengths, h_0 = scan.x, scan.lengths, scan.h_0
    a, b = _merged(scan.a, scan.b)
    scan = scan._replace(a=a, b=b)
    if lengths is not None and not descending(lengths):
        order, back = by_length(lengths)
        h, h_n = forward(in_order(scan, order), how)
        return h[:, back], h_n[back]
    allocate = torch.empty if lengths is None else torch.zeros  # zero beyond a row's length
    h = allocate(time, batch, x.shape[-1], dtype=x.dtype, device=x.device)
    state = h.new_zeros(h.shape[1:], dtype=a.dtype) if h_0 is None else h_0.to(a.dtype, copy=True)
    for start, end, rows in intervals(batch, time, lengths):
        part = interval(scan, start, end, rows)
        _forward(h[start:end, :rows], state[:rows], part, how.nonlinearity)
    return h, last_state(h, a.dtype, h_0, lengths)


def _forward(
    out: Tensor,  # (T, B, F), written
    state_0: Tensor,  # (B, F), the state before the first step; the last one is written over it
    scan: Scan,
    nonlinearity: str,
) -> None:
    """All rows for all steps of one interval."""
    step = _Step(out, scan.a, scan.b)
    inputs = _inputs(scan)
    state = step.buffer(step.chunk + 1)
    step.load(state[:1], state_0[None])
    rows, blocks = step.rows(state), step.blocks(state)
    if step.has_left:
        middle = step.buffer(1)
        middle_rows, middle_block = step.rows(middle)[0], step.blocks(middle)[0]
    activate = _activation(step, state, nonlinearity, scan.beta)
    cut, cuts = step.cut(scan.reset)
    gates = None
    if scan.gate is not None:
        multiply, _ = _gate_products(step, scan.gate)
        gates, gated = step.buffer(step.chunk), step.buffer(1)
    last = 0
    for start, end in step.chunks():
        if start:
            state[0].copy_(state[last])
        last = end - start
        step.load(state[1 : last + 1], inputs(start, end))
        if gates is not None:
            step.load(gates[:last], scan.gate[start:end])
        for i in range(last):
            previous = rows[i]
            if gates is not None:
                multiply(gates[i], state[i], out=gated[0])
                previous = step.rows(gated)[0]
            if cuts[start + i]:  # not in place: slot i is still to be copied out
                whole = state[i] if gates is None else gated[0]
                previous = whole.masked_fill(cut[start + i], 0).view_as(rows[i])
            if step.has_left:
                torch.bmm(previous, step.right, out=middle_rows)
                blocks[i + 1].baddbmm_(step.left, middle_block)
            else:
                rows[i + 1].baddbmm_(previous, step.right)
            activate(i + 1)
        step.planar(out[start:end]).copy_(state[1 : last + 1])
    step.planar(state_0[None]).copy_(state[last : last + 1])


def _inputs(scan: Scan) -> Callable[[int, int], Tensor]:
    """A function of two steps: the inputs `(n, B, F)` between them."""
    x, tokens = scan.x, scan.tokens
    if tokens is None:
        return lambda i, j: x[i:j]
    return lambda i, j: x[tokens[i:j]]


def _activation(step: _Step, state: Tensor, nonlinearity: str, beta: Tensor | None):
    """A function of a slot number that applies σ to that slot in place."""
    slots = list(state.unbind(0))
    if nonlinearity == "identity":
        return lambda i: None
    if nonlinearity == "relu":
        return lambda i: slots[i].clamp_min_(0)
    if nonlinearity == "tanh":
        return lambda i: slots[i].tanh_()
    squared = torch.empty_like(state[0, ..., :1, :])  # (H, B, P, 1, Q)
    floor = squared.new_tensor(tiny(step.dtype))
    scale = torch.empty_like(squared)
    parts = [_parts(s) for s in slots]

    def squared_modulus(i):
        torch.addcmul(floor, parts[i][0], parts[i][0], out=squared)
        for part in parts[i][1:]:
            squared.addcmul_(part, part)

    def multiply(i):
        for part in parts[i]:
            part.mul_(scale)

    if nonlinearity == "modtanh":

        def modtanh(i):
            squared_modulus(i)
            squared.sqrt_()
            torch.tanh(squared, out=scale)
            scale.div_(squared)
            multiply(i)

        return modtanh
    one, bias = squared.new_ones(()), step.units(beta)

    def modrelu(i):
        squared_modulus(i)
        squared.rsqrt_()
        torch.addcmul(one, bias, squared, out=scale)
        scale.clamp_min_(0)
        multiply(i)

    return modrelu


def _gate_products(step: _Step, gate: Tensor) -> tuple[Callable, Callable]:
    """multiply(gate, x, out=) and add_conj_product(out, gate, x), of slots."""
    if step.parts_of(gate) == 2:
        return _product, _add_conj_product
    return torch.mul, Tensor.addcmul_


def _product(gate: Tensor, x: Tensor, *, out: Tensor) -> None:
    """Write gate ⊙ x, of complex slots."""
    (real, imag), (first, second), results = _parts(gate), _parts(x), _parts(out)
    torch.mul(real, first, out=results[0]).addcmul_(imag, second, value=-1)
    torch.mul(real, second, out=results[1]).addcmul_(imag, first)


def _add_conj_product(out: Tensor, gate: Tensor, x: Tensor) -> None:
    """Add conj(gate) ⊙ x, of complex slots."""
    (real, imag), (first, second), results = _parts(gate), _parts(x), _parts(out)
    results[0].addcmul_(real, first).addcmul_(imag, second)
    results[1].addcmul_(real, second).addcmul_(imag, first, value=-1)


def _parts(x: Tensor) -> list[Tensor]:
    """The views `(…, P, 1, Q)` of real and imaginary part: a product of one of them with a real
    factor is three times as fast on a CPU as that of both, which broadcasts in the middle."""
    return [x[..., k : k + 1, :] for k in range(x.shape[-2])]


def backward(
    dh: Tensor | None,  # (T, B, F)
    dh_n: Tensor | None,  # (B, F)
    h: Tensor,  # (T, B, F)
    scan: Scan,  # x, and tokens, for modtanh only
    how: How,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of a step's input as `(T, B, F)`, of a, b, beta (zeros without one) and h_0, and of
    the gate."""
    a, b, lengths, h_0 = scan.a, scan.b, scan.lengths, scan.h_0
    merged = _merged(a, b)
    if merged[0].shape != a.shape:
        scan = scan._replace(a=merged[0], b=merged[1])
        dx, _, d, d_beta, dh_0, d_gate = backward(dh, dh_n, h, scan, how)
        return dx, *_merged_grad(d, a, b), d_beta, dh_0, d_gate
    time, batch, features = h.shape
    if lengths is not None and not descending(lengths):
        order, back = by_length(lengths)
        dh = None if dh is None else dh[:, order]
        dh_n = None if dh_n is None else dh_n[order]
        dx, da, db, d_beta, dh_0, d_gate = backward(
            dh, dh_n, h[:, order], in_order(scan, order), how
        )
        d_gate = None if d_gate is None else d_gate[:, back]
        return dx[:, back], da, db, d_beta, dh_0[back], d_gate
    allocate = torch.empty if lengths is None else torch.zeros
    dx = allocate(h.shape, dtype=h.dtype, device=h.device)
    d_gate = None
    if scan.gate is not None:
        d_gate = allocate(scan.gate.shape, dtype=scan.gate.dtype, device=h.device)
    dh_0 = a.new_zeros(batch, features) if dh_n is None else dh_n.to(a.dtype, copy=True)
    first = a.new_zeros(batch, features) if h_0 is None else h_0
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    d_beta = a.new_zeros(features // a.shape[0])
    for start, end, rows in reversed(intervals(batch, time, lengths)):
        before = h[start - 1, :rows] if start else first[:rows]
        part = interval(scan, start, end, rows)._replace(h_0=before)
        at = slice(start, end), slice(rows)
        d_out = None if dh is None else dh[at]
        d_part = None if d_gate is None else d_gate[at]
        added = _backward(dx[at], d_part, dh_0[:rows], d_out, h[at], part, how.nonlinearity)
        for total, more in zip((da, db, d_beta), added):
            total += more
    return dx, da, db, d_beta, dh_0, d_gate


def _backward(
    dx: Tensor,  # (T, B, F), written
    d_gate: Tensor | None,  # as the gate, written
    d_state: Tensor,  # (B, F), gradient of the last state; that of h_0 is written over it
    dh: Tensor | None,  # (T, B, F)
    h: Tensor,  # (T, B, F)
    scan: Scan,
    nonlinearity: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows for all steps of one interval; returns the gradients of a, b and beta."""
    step = _Step(h, scan.a, scan.b)
    inputs = None if scan.x is None else _inputs(scan)
    grad = step.buffer(step.chunk + 1)  # slot 0: the gradient handed to the chunk before
    states = step.buffer(step.chunk + 1)  # slot i: h before step i of the chunk
    weights = _WeightGrads(step)
    rounding = torch.finfo(h.dtype).eps / 2
    adjoint = _Adjoint(step, grad, states, nonlinearity, scan.beta, rounding)
    grad_rows, right_t = step.rows(grad), step.right.transpose(-1, -2)
    if step.has_left:
        inner = step.buffer(step.chunk)  # Aᴴ G_t, as it falls out of the loop
        left_t, grad_blocks = step.left.transpose(-1, -2), step.blocks(grad)
        inner_rows, inner_blocks = step.rows(inner), step.blocks(inner)
    cut, cuts = step.cut(scan.reset)
    if d_gate is not None:
        multiply, add_conj_product = _gate_products(step, scan.gate)
        gates, gated, back = (step.buffer(step.chunk) for _ in range(3))
        back_rows = step.rows(back)
    carry = step.buffer(1)
    step.load(carry, d_state[None])
    for start, end in reversed(step.chunks()):
        n = end - start
        if dh is None:
            grad[1 : n + 1].zero_()
        else:
            step.load(grad[1 : n + 1], dh[start:end])
        grad[n].add_(carry[0])
        grad[0].zero_()
        step.load(states[1 : n + 1], h[start:end])
        step.load(states[:1], h[start - 1 : start] if start else scan.h_0[None])
        before = states[:n]
        if any(cuts[start:end]):
            before = before.masked_fill(cut[start:end], 0)
        past = before
        if d_gate is not None:
            step.load(gates[:n], scan.gate[start:end])
            before = gated[:n]
            multiply(gates[:n], past, out=before)
        adjoint.prepare(before, None if inputs is None else inputs(start, end))
        for i in range(n - 1, -1, -1):
            adjoint.step(i)
            if step.has_left:
                left_back = inner_rows[i]
                torch.bmm(left_t, grad_blocks[i + 1], out=inner_blocks[i])
                if cuts[start + i]:
                    inner[i].masked_fill_(cut[start + i], 0)
            else:
                left_back = grad_rows[i + 1]
                if cuts[start + i]:
                    left_back = grad[i + 1].masked_fill(cut[start + i], 0).view_as(left_back)
            if d_gate is None:
                grad_rows[i].baddbmm_(left_back, right_t)
            else:
                torch.bmm(left_back, right_t, out=back_rows[i])
                add_conj_product(grad[i], gates[i], back[i])
        carry[0].copy_(grad[0])
        adjoint.finish(n)
        g = grad[1 : n + 1]
        weights.add(before, g, inner[:n] if step.has_left else g)
        step.planar(dx[start:end]).copy_(grad[1 : n + 1])
        if d_gate is not None:
            add_conj_product(gates[:n].zero_(), past, back[:n])
            d = gates[:n]
            if step.parts_of(d_gate) < step.parts:
                d = d.sum(-2, keepdim=True)
            step.planar(d_gate[start:end]).copy_(d)
    step.planar(d_state[None]).copy_(carry)
    return weights.a(), weights.b(), adjoint.d_beta.view(-1)


class _WeightGrads:
    """The gradients of A and B, summed chunk by chunk as those of their block matrices."""

    def __init__(self, step: _Step):
        self.step = step
        self.right = torch.zeros_like(step.right)
        if step.has_left:
            pc = step.p * step.parts
            self.left = self.right.new_zeros(step.heads, pc, pc)
            self.product, self.x_wide, self.g_wide = (step.buffer(step.chunk) for _ in range(3))

    def add(self, x: Tensor, g: Tensor, inner: Tensor) -> None:
        """A chunk of X_{t-1}, of G_t and of Aᴴ G_t, or with no A of G_t again."""
        step = self.step
        rows = step.by_head(x)
        self.right.baddbmm_(rows.transpose(-1, -2), step.by_head(inner))
        if step.has_left:
            product = self.product.view(-1)[: x.numel()].view(rows.shape)
            torch.bmm(rows, step.right, out=product)  # X Bᵀ
            n, *sizes = x.shape
            product = product.view(step.heads, n, *sizes[1:]).transpose(0, 1)
            x, g = self._wide(product, self.x_wide), self._wide(g, self.g_wide)
            self.left.baddbmm_(g, x.transpose(-1, -2))

    def _wide(self, x: Tensor, buffer: Tensor) -> Tensor:
        """`(n, H, B, P, c, Q)` as `(H, P·c, n·B·Q)`: one product sums over steps and rows."""
        x = x.permute(1, 3, 4, 0, 2, 5)
        buffer = buffer.view(-1)[: x.numel()].view(x.shape).copy_(x)
        return buffer.flatten(3).flatten(1, 2)

    def a(self) -> Tensor:
        parts = self.step.parts
        if self.step.has_left:
            return left_block_grad(self.left, parts)
        return self.right.new_zeros(parts, self.step.heads, 1, 1)

    def b(self) -> Tensor:
        return right_block_grad(self.right, self.step.parts)


class _Adjoint:
    """G = σ'(z)ᵀ g, with everything that does not depend on g computed per chunk.

    relu, tanh     G = d·g per part
    phase kinds    G = r·g + e·v·Re(conj(v) g),  r = σ(z)/z,  e = (|σ|' − r)/|v|²,  v ∥ z
                   modReLU  v = h,  r = |h|/(|h| − β) and |σ|' = 1 where |h| > 0 (else v = r = 0);
                            dβ = Σ Re(conj(h) g)/|h|
                            |h| − β is known no better than h is rounded: `rounding`·|h| bounds it
                   modtanh  v = z,  r = tanh|z|/|z| and |σ|' = 1 − tanh²|z|
    """

    def __init__(
        self,
        step: _Step,
        grad: Tensor,
        states: Tensor,
        nonlinearity: str,
        beta: Tensor | None,
        rounding: float,
    ):
        self.layout, self.nonlinearity, self.rounding = step, nonlinearity, rounding
        self.states, self.grad = states[1:], list(grad[1:].unbind(0))
        self.d_beta = grad.new_zeros(step.heads, 1, step.p, 1, step.q)
        self.bias = None if beta is None else step.units(beta)
        if nonlinearity == "identity":
            return
        if nonlinearity not in PHASE_NONLINEARITIES:
            self.slope = step.buffer(step.chunk)  # d
            self.slopes = list(self.slope.unbind(0))
            return
        self.vectors = self.states if nonlinearity == "modrelu" else step.buffer(step.chunk)  # v
        one = self.vectors[..., :1, :]
        self.ratio, self.radial, self.rho, self.modulus = (torch.empty_like(one) for _ in range(4))
        self.scratch = torch.empty_like(one[0])
        slots = (x.unbind(0) for x in (self.ratio, self.radial, self.rho, grad[1:], self.vectors))
        self.slots = [(r, e, rho, _parts(g), _parts(v)) for r, e, rho, g, v in zip(*slots)]

    def prepare(self, before: Tensor, x: Tensor | None) -> None:
        """Compute the coefficients of the n steps of a chunk from its states; for modtanh from the
        states before its steps and its inputs `(n, B, F)`."""
        n = before.shape[0]
        h = self.states[:n]
        if self.nonlinearity == "relu":
            torch.sign(h, out=self.slope[:n])
        elif self.nonlinearity == "tanh":
            torch.addcmul(h.new_ones(()), h, h, value=-1, out=self.slope[:n])
        elif self.nonlinearity in PHASE_NONLINEARITIES:
            if self.nonlinearity == "modtanh":
                self._pre_activations(before, x)
            floor, one = tiny(h.dtype), h.new_ones(())
            ratio, radial, squared, modulus = (
                buffer[:n] for buffer in (self.ratio, self.radial, self.rho, self.modulus)
            )
            first, *rest = _parts(self.vectors[:n])
            torch.mul(first, first, out=squared)
            for part in rest:
                squared.addcmul_(part, part)
            torch.sqrt(squared, out=modulus)
            squared.clamp_min_(floor)
            if self.nonlinearity == "modrelu":  # |z| = |h| - beta
                torch.sub(modulus, self.bias, out=radial)
                torch.mul(modulus, self.rounding, out=ratio)
                torch.maximum(radial, ratio, out=radial).clamp_min_(floor)
                torch.div(modulus, radial, out=ratio)
                torch.sub(one, ratio, out=radial)
            else:
                modulus.clamp_min_(floor)
                torch.tanh(modulus, out=radial)
                torch.div(radial, modulus, out=ratio)
                torch.addcmul(one, radial, radial, value=-1, out=radial).sub_(ratio)
            radial.div_(squared)

    def _pre_activations(self, before: Tensor, x: Tensor) -> None:
        """Fill `vectors` with z."""
        step, z = self.layout, self.vectors[: before.shape[0]]
        step.load(z, x)
        if not step.has_left:
            for zt, rows in zip(step.rows(z), step.rows(before)):
                zt.baddbmm_(rows, step.right)
            return
        for zt, rows in zip(step.blocks(z), step.rows(before)):
            zt.baddbmm_(step.left, torch.bmm(rows, step.right).view_as(zt))

    def step(self, i: int) -> None:
        """Turn g of step i of the chunk into G, in place."""
        if self.nonlinearity == "identity":
            return
        if self.nonlinearity not in PHASE_NONLINEARITIES:
            self.grad[i].mul_(self.slopes[i])
            return
        ratio, radial, rho, grads, vectors = self.slots[i]
        torch.mul(grads[0], vectors[0], out=rho)
        for g, v in zip(grads[1:], vectors[1:]):
            rho.addcmul_(g, v)
        torch.mul(rho, radial, out=self.scratch)
        for g, v in zip(grads, vectors):
            g.mul_(ratio).addcmul_(v, self.scratch)

    def finish(self, n: int) -> None:
        """Add the chunk's part of dβ."""
        if self.nonlinearity == "modrelu":
            rho = self.rho[:n].div_(self.modulus[:n].clamp_min_(tiny(self.rho.dtype)))
            self.d_beta += rho.sum((0, 2), keepdim=True)[0]
