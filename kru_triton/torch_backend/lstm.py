"""The `torch` backend of the Kronecker LSTM: its recurrence and written-out adjoint.

    forward    z_k = A_k X_{t-1} B_kᵀ + u_k   for the gates k = i, f, g, o,   X = h.reshape(P, Q)
               c_t = σ(z_f) c_{t-1} + σ(z_i) tanh(z_g),   h_t = σ(z_o) tanh(c_t)
    adjoint    dc += dh o (1 - tanh² c_t),   dz_i = dc g i (1 - i),   dz_f = dc c_{t-1} f (1 - f),
               dz_g = dc i (1 - g²),   dz_o = dh tanh(c_t) o (1 - o),
               dh_{t-1} += Σ_k A_kᵀ dz_k B_k,   dc_{t-1} = dc f
    weights    dA_k = Σ (dz_k B_k) X_{t-1}ᵀ,   dB_k = Σ dz_kᵀ (A_k X_{t-1})

Only h and c are saved: backward the gates of a chunk of steps are computed again, all at once, and
turned into the coefficients of dh and dc, so that a step of the loop is three products by them, one
update of dc and two matrix products.

Memory plan. Inside, a state is `(H, P, B, Q)` and the gates `(H, 4, P, B, Q)` in the order o, i, f,
g: sigmoids lie together, and so do the gates that hang on dc. In that order `A_k X` of all gates is
one product with the `(4P, P)` matrix of all A_k, `V B_kᵀ` one product per gate, and on the way back
`Σ_k A_kᵀ V_k` one product again; nothing is permuted between them. Time is cut into chunks that
stay in the cache.

B batch, T time, H heads, P, Q sizes of A_k and B_k, F = H·P·Q features of a state.
"""

import torch
from torch import Tensor

from kru_triton.ops.arguments import How, LSTMScan
from kru_triton.torch_backend.rows import handed_on, last_state, past_end
from kru_triton.torch_backend.scan import CHUNK_STEPS

CHUNK_BYTES = 1 << 20  # per chunk buffer of gates

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # d y (1 - y)
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # d (1 - y²)


class _Layout:
    """Sizes, weights and the order of memory for one call."""

    def __init__(self, time: int, batch: int, a: Tensor, b: Tensor):
        self.heads, self.p, self.q = a.shape[1], a.shape[-1], b.shape[-1]
        self.time, self.batch = time, batch
        self.dtype, self.device = a.dtype, a.device
        # the weights of every step of a chunk lie side by side when the gates are recomputed
        numbers = 4 * self.heads * max(batch * self.p * self.q, self.p**2, self.q**2)
        most = CHUNK_BYTES // (numbers * self.dtype.itemsize)
        self.chunk = max(1, min(time, CHUNK_STEPS, most))
        self.left = a.roll(1, 0).transpose(0, 1).reshape(self.heads, 4 * self.p, self.p)
        right = b.roll(1, 0).transpose(0, 1).transpose(-1, -2)
        self.right = right.reshape(4 * self.heads, self.q, self.q)

    def left_grad(self, d: Tensor) -> Tensor:
        """The gradient of a `(4, H, P, P)` from that of `left`."""
        return d.view(self.heads, 4, self.p, self.p).transpose(0, 1).roll(-1, 0)

    def right_grad(self, d: Tensor) -> Tensor:
        """The gradient of b `(4, H, Q, Q)` from that of `right`."""
        d = d.view(self.heads, 4, self.q, self.q).transpose(0, 1).transpose(-1, -2)
        return d.roll(-1, 0).contiguous()

    def states(self, slots: int) -> Tensor:
        """An empty `(slots, H, P, B, Q)` buffer."""
        shape = (slots, self.heads, self.p, self.batch, self.q)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def gates(self, slots: int) -> Tensor:
        """An empty `(slots, H, 4, P, B, Q)` buffer."""
        shape = (slots, self.heads, 4, self.p, self.batch, self.q)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def flat(self, x: Tensor) -> Tensor:
        """`(T, B, F)` of any strides as the permuted view `(T, H, P, B, Q)`."""
        shape = (x.shape[0], self.batch, self.heads, self.p, self.q)
        return x.view(shape).permute(0, 2, 3, 1, 4)

    def flat_gates(self, x: Tensor) -> Tensor:
        """`(T, B, 4·F)` of any strides as the permuted view `(T, H, 4, P, B, Q)`, order i f g o."""
        shape = (x.shape[0], self.batch, 4, self.heads, self.p, self.q)
        return x.view(shape).permute(0, 3, 2, 4, 1, 5)

    def load_gates(self, slots: Tensor, x: Tensor) -> None:
        """Copy `(T, B, 4·F)` into T slots."""
        x = self.flat_gates(x)
        slots[:, :, 1:].copy_(x[:, :, :3])
        slots[:, :, 0].copy_(x[:, :, 3])

    def store_gates(self, x: Tensor, slots: Tensor) -> None:
        """Copy T slots out into `(T, B, 4·F)`."""
        x = self.flat_gates(x)
        x[:, :, :3].copy_(slots[:, :, 1:])
        x[:, :, 3].copy_(slots[:, :, 0])

    def left_in(self, x: Tensor) -> Tensor:
        """States `(n, H, P, B, Q)` as `(n·H, P, B·Q)`, which `left` multiplies."""
        return x.flatten(-2).flatten(0, -3)

    def left_out(self, x: Tensor) -> Tensor:
        """Gates `(n, H, 4, P, B, Q)` as `(n·H, 4·P, B·Q)`, what `left` gives."""
        return x.flatten(-4, -3).flatten(-2).flatten(0, -3)

    def rows(self, x: Tensor) -> Tensor:
        """Gates `(n, H, 4, P, B, Q)` as `(n·H·4, P·B, Q)`, which multiplies `right`."""
        return x.flatten(-3, -2).flatten(0, -3)

    def chunks(self):
        """The pairs (start, end) of all chunks in time order."""
        return [(t, min(t + self.chunk, self.time)) for t in range(0, self.time, self.chunk)]

    def cut(self, reset: Tensor | None):
        """`(T, 1, 1, B, 1)` True where a state is cut, and the list of steps where any is."""
        if reset is None:
            return None, [False] * self.time
        mask = reset.contiguous().view(self.time, 1, 1, self.batch, 1)
        return mask, reset.any(1).tolist()

    def ends(self, lengths: Tensor | None):
        """`(T, B)` True beyond a row's length, and the rows that end with a step."""
        if lengths is None:
            return None, {self.time - 1: slice(None)}
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(lengths.tolist()):
            rows.setdefault(length - 1, []).append(row)
        return past_end(self.time, lengths), rows


def forward(scan: LSTMScan, how: How) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h `(T, B, F)` in the dtype of x; c alike, and h_n and c_n `(B, F)`, the last rows of both, in
    that of a."""
    x, a, b, h_0, c_0, reset, lengths = scan
    time, batch, features = x.shape
    layout = _Layout(time, batch, a, b)
    h = x.new_empty(time, batch, features // 4)
    c = a.new_empty(h.shape)
    state, cell = layout.states(layout.chunk + 1), layout.states(layout.chunk + 1)
    _load_before(layout, state[:1], h, h_0, 0)
    _load_before(layout, cell[:1], c, c_0, 0)
    gates = layout.gates(layout.chunk)
    middle = layout.gates(1)
    middle_out, middle_rows = layout.left_out(middle), layout.rows(middle)
    states, cells = list(state.unbind(0)), list(cell.unbind(0))
    inputs = [layout.left_in(s) for s in states]
    rows = [layout.rows(z) for z in gates.unbind(0)]
    sigmoids = [z[:, :3] for z in gates.unbind(0)]
    parts = [z.unbind(1) for z in gates.unbind(0)]
    tanh_c = torch.empty_like(states[0])
    cut, cuts = layout.cut(reset)
    last = 0
    for start, end in layout.chunks():
        if start:
            state[0].copy_(state[last])
            cell[0].copy_(cell[last])
        last = end - start
        layout.load_gates(gates[:last], x[start:end])
        for i in range(last):
            before, c_before = inputs[i], cells[i]
            if cuts[start + i]:  # not in place: slot i is still to be copied out
                before = layout.left_in(states[i].masked_fill(cut[start + i], 0))
                c_before = c_before.masked_fill(cut[start + i], 0)
            torch.bmm(layout.left, before, out=middle_out)
            rows[i].baddbmm_(middle_rows, layout.right)
            sigmoids[i].sigmoid_()
            o, input, forget, g = parts[i]
            g.tanh_()
            torch.mul(forget, c_before, out=cells[i + 1])
            cells[i + 1].addcmul_(input, g)
            torch.tanh(cells[i + 1], out=tanh_c)
            torch.mul(o, tanh_c, out=states[i + 1])
        layout.flat(h[start:end]).copy_(state[1 : last + 1])
        layout.flat(c[start:end]).copy_(cell[1 : last + 1])
    if lengths is not None:
        beyond = past_end(time, lengths)[..., None]
        h.masked_fill_(beyond, 0)
        c.masked_fill_(beyond, 0)
    firsts = ((h, h_0), (c, c_0))
    h_n, c_n = (last_state(s, a.dtype, first, lengths) for s, first in firsts)
    return h, c, h_n, c_n


def backward(
    dh: Tensor | None,  # (T, B, F)
    dh_n: Tensor | None,  # (B, F)
    dc_n: Tensor | None,  # (B, F)
    h: Tensor,  # (T, B, F)
    c: Tensor,  # (T, B, F)
    scan: LSTMScan,
    how: How,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x as `(T, B, 4·F)`, and of a, b, h_0 and c_0."""
    x, a, b, h_0, c_0, reset, lengths = scan
    time, batch, features = h.shape
    layout = _Layout(time, batch, a, b)
    chunk, heads = layout.chunk, layout.heads
    dx = x.new_empty(time, batch, 4 * features)
    before, cell = layout.states(chunk), layout.states(chunk + 1)
    tanh_c, slope = layout.states(chunk), layout.states(chunk)
    grad = layout.states(chunk + 1)  # slot 0: the gradient handed to the chunk before
    dc = layout.states(1).zero_()[0]
    gates, dz = layout.gates(chunk), layout.gates(chunk)
    forward, back = layout.gates(chunk), layout.gates(chunk)  # A_k X and dz_k B_k
    # the weights of every step of a chunk: views with one head, else copies
    left = layout.left.expand(chunk, -1, -1, -1).reshape(chunk * heads, *layout.left.shape[1:])
    right = layout.right.repeat(chunk, 1, 1)
    left_t, right_t = layout.left.transpose(-1, -2), layout.right.transpose(-1, -2)
    d_left, d_right = torch.zeros_like(layout.left), torch.zeros_like(layout.right)
    grads = list(grad.unbind(0))
    grad_in = [layout.left_in(g) for g in grads]
    dz_rows, back_rows = layout.rows(dz).split(4 * heads), layout.rows(back).split(4 * heads)
    back_out = layout.left_out(back).split(heads)
    outputs, others = list(dz[:, :, 0].unbind(0)), list(dz[:, :, 1:].unbind(0))
    slopes, forgets = list(slope.unbind(0)), list(gates[:, :, 2].unbind(0))
    cut, cuts = layout.cut(reset)
    beyond, ends = layout.ends(lengths)
    last_dh, last_dc = (None if d is None else layout.flat(d[None])[0] for d in (dh_n, dc_n))
    grads[0].zero_()
    for start, end in reversed(layout.chunks()):
        n = end - start
        grads[n].copy_(grads[0])
        if dh is None:
            grad[1:n].zero_()
        else:
            d = dh[start:end]
            d = d if beyond is None else d.masked_fill(beyond[start:end, :, None], 0)
            grad[1:n].copy_(layout.flat(d[:-1]))
            grads[n].add_(layout.flat(d[-1:])[0])
        _load_before(layout, before[:n], h, h_0, start)
        _load_before(layout, cell[:n], c, c_0, start)
        cell[n].copy_(layout.flat(c[end - 1 : end])[0])
        torch.tanh(cell[1 : n + 1], out=tanh_c[:n])
        if any(cuts[start:end]):
            before[:n].masked_fill_(cut[start:end], 0)
            cell[:n].masked_fill_(cut[start:end], 0)
        layout.load_gates(gates[:n], x[start:end])
        if beyond is not None:  # what is there may be anything
            gates[:n].masked_fill_(beyond[start:end, None, None, None, :, None], 0)
        torch.bmm(left[: n * heads], layout.left_in(before[:n]), out=layout.left_out(forward[:n]))
        layout.rows(gates[:n]).baddbmm_(layout.rows(forward[:n]), right[: 4 * n * heads])
        gates[:n, :, :3].sigmoid_()
        gates[:n, :, 3].tanh_()
        _coefficients(gates[:n], cell[:n], tanh_c[:n], slope[:n], dz[:n])
        for k in range(n - 1, -1, -1):
            dh_t = grads[k + 1]
            if start + k in ends:
                _add_rows(dh_t, last_dh, ends[start + k])
                _add_rows(dc, last_dc, ends[start + k])
            dc.addcmul_(dh_t, slopes[k])
            outputs[k].mul_(dh_t)
            others[k].mul_(dc[:, None])
            dc.mul_(forgets[k])
            torch.bmm(dz_rows[k], right_t, out=back_rows[k])
            if cuts[start + k]:
                back[k].masked_fill_(cut[start + k], 0)
                dc.masked_fill_(cut[start + k], 0)
            if k:
                grad_in[k].baddbmm_(left_t, back_out[k])
            else:
                torch.bmm(left_t, back_out[k], out=grad_in[k])
        pairs = layout.rows(forward[:n]).transpose(-1, -2) @ layout.rows(dz[:n])
        d_right += pairs.view(n, *d_right.shape).sum(0)
        pairs = layout.left_out(back[:n]) @ layout.left_in(before[:n]).transpose(-1, -2)
        d_left += pairs.view(n, *d_left.shape).sum(0)
        layout.store_gates(dx[start:end], dz[:n])
    firsts = (d.permute(2, 0, 1, 3).reshape(batch, features) for d in (grads[0], dc))
    dh_0, dc_0 = (handed_on(d, last, lengths, time) for d, last in zip(firsts, (dh_n, dc_n)))
    return dx, layout.left_grad(d_left), layout.right_grad(d_right), dh_0, dc_0


def _coefficients(gates: Tensor, cell: Tensor, tanh_c: Tensor, slope: Tensor, dz: Tensor) -> None:
    """Of a chunk, fill `slope` with what dh adds to dc, and `dz` with what dh (gate o) and dc (all
    others) are multiplied by; `cell` holds c_{t-1}."""
    o, i, f, g = gates.unbind(2)
    for formula, source, value, target in (
        (tanh_backward, o, tanh_c, slope),
        (sigmoid_backward, tanh_c, o, dz[:, :, 0]),
        (sigmoid_backward, g, i, dz[:, :, 1]),
        (sigmoid_backward, cell, f, dz[:, :, 2]),
        (tanh_backward, i, g, dz[:, :, 3]),
    ):
        formula(source, value, grad_input=target)


def _load_before(layout: _Layout, slots: Tensor, x: Tensor, first: Tensor | None, start: int):
    """Copy what was there before the steps from `start` on into as many slots."""
    n = slots.shape[0]
    if start:
        slots.copy_(layout.flat(x[start - 1 : start + n - 1]))
        return
    slots[1:].copy_(layout.flat(x[: n - 1]))
    if first is None:
        slots[0].zero_()
    else:
        slots[0].copy_(layout.flat(first[None])[0])


def _add_rows(x: Tensor, d: Tensor | None, rows) -> None:
    """Add those batch rows of `d (H, P, B, Q)` to x."""
    if d is not None:
        x[:, :, rows] += d[:, :, rows]
