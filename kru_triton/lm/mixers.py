"""What mixes the positions of a block: a recurrence with a projection, or attention.

A mixer knows itself: how many states it carries, why no kernel runs it, how single steps are fast.

B batch, T time, D d_model, H heads, E features of a head. Tensors are time-first `(T, B, D)`.
"""

import contextlib
import itertools

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from kru_triton.layers.kru import KRU
from kru_triton.layers.lstm import KRULSTM
from kru_triton.layers.mingru import MinGRU
from kru_triton.layers.recurrent import RecurrentLayers
from kru_triton.lm.presets import LanguageModelConfig


class Mixer(nn.Module):
    """What mixes the positions of a block: `y, state = mixer(x, state, reset)`.

    x and y are `(T, B, D)`, reset is `(B, T)` or None; state is a list of `num_states` tensors with
    B as their first dimension, or None for the start.
    """

    op: str | None = None  # of kru_triton, that runs its time loop
    num_states: int

    def recurrences(self) -> list[RecurrentLayers]:
        """Its Kronecker layers, whatever stands around them."""
        return [module for module in self.modules() if isinstance(module, RecurrentLayers)]

    def why_not_triton(self) -> str | None:
        """Why no kernel runs its time loop where its weights are, in one sentence; None: one does.

        Example:
            >>> mixer_of(LanguageModelConfig(model="gru")).why_not_triton()
            "its layers are torch.nn's"
        """
        for layers in self.recurrences():
            return layers.why_not_triton()
        return "its layers are torch.nn's"

    @contextlib.contextmanager
    def decoding(self):
        """Inside, single steps are fast where they can be: see `KRU.decoding`."""
        with contextlib.ExitStack() as stack:
            for layers in self.recurrences():
                stack.enter_context(layers.decoding())
            yield


def shifted(
    x: Tensor, share: Tensor, last: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t + share · (x_{t-1} − x_t), with zeros for the x before the first of a document; and the
    last x, in memory of its own: a state must not hold the sequence that it has seen."""
    first = x.new_zeros(1, *x.shape[1:]) if last is None else last[None].to(x.dtype)
    seen = torch.cat((first, x))
    before = seen[:-1]
    if reset is not None:
        before = before.masked_fill(reset.t()[..., None], 0)
    return x + share.to(x.dtype) * (before - x), seen[-1].clone()


class KRUMixer(Mixer):
    """V (norm(KRU(x · sigmoid(I x))) · silu(G x)), where x_t may be mixed with x_{t-1}."""

    op = "kru_scan"

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.kru = KRU(
            config.d_model,
            config.hidden_size,
            factors=config.factors,
            num_heads=config.num_heads,
            field=config.field,
            nonlinearity=config.nonlinearity,
            state_gate=config.state_gate,
            time_parallel=config.time_parallel,
            backend=config.backend,
            precision=config.precision,
        )
        factors = self.kru.recurrent_factors(0)
        with torch.no_grad():
            for w in factors:
                w.mul_(config.radius ** (1 / len(factors)))
        features = self.kru.output_size
        plain = config.frame == "plain"
        self.norm = nn.Identity() if plain else nn.LayerNorm(features, bias=False)
        self.gate = nn.Linear(config.d_model, features) if config.gated else None
        d = config.d_model
        self.input_gate = nn.Linear(d, d) if config.input_gated else None
        self.shift = nn.Parameter(torch.empty(d)) if config.token_shift else None
        self.num_states = 1 if self.shift is None else 2  # h_n, and the last x
        self.reset_parameters()
        self.projection = nn.Linear(features, config.d_model, bias=False)

    def reset_parameters(self) -> None:
        """Start without a share of the token before; the layers draw their own weights."""
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        last: list[Tensor] = []
        if self.shift is not None:
            x, *last = shifted(x, self.shift, None if state is None else state[1], reset)
        read = x if self.input_gate is None else x * self.input_gate(x).sigmoid()
        h, h_n = self.kru(read, None if state is None else state[0][None], reset=reset)
        h = self.norm(h)
        if self.gate is not None:
            gate = nnf.silu(self.gate(x))
            h = h.to(gate.dtype) * gate  # under autocast the norm leaves float32
        return self.projection(h), [h_n[0], *last]


class KRULSTMMixer(Mixer):
    """A projected Kronecker LSTM."""

    op, num_states = "kru_lstm_scan", 2

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.lstm = KRULSTM(
            config.d_model,
            config.hidden_size,
            factors=config.factors,
            num_heads=config.num_heads,
            backend=config.backend,
            precision=config.precision,
        )
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        hx = None if state is None else tuple(s[None] for s in state)
        h, last = self.lstm(x, hx, reset=reset)
        return self.projection(h), [s[0] for s in last]


class RNNMixer(Mixer):
    """A projected `torch.nn` LSTM, GRU or RNN; a reset splits the sequence where it falls."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        kind = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[config.model]
        self.rnn = kind(config.d_model, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)
        self.num_states = 2 if config.model == "lstm" else 1

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        time, batch = x.shape[:2]
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._lacks_bfloat16(x):
            context, x = torch.autocast("cpu", enabled=False), x.to(self.projection.weight.dtype)
        if state is None:
            state = [x.new_zeros(batch, self.rnn.hidden_size) for _ in range(self.num_states)]
        cuts = [] if reset is None else reset.any(0).nonzero().flatten().tolist()
        outputs = []
        bounds = [0, *(t for t in cuts if t), time]
        for start, end in itertools.pairwise(bounds):
            if start in cuts:
                state = [s.masked_fill(reset[:, start, None], 0) for s in state]
            before = tuple(s[None].contiguous() for s in state)
            with context:
                y, after = self.rnn(x[start:end], before if self.num_states == 2 else before[0])
            state = [s[0] for s in (after if self.num_states == 2 else (after,))]
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.projection(y), state

    def _lacks_bfloat16(self, x: Tensor) -> bool:
        """Whether autocast asks oneDNN for an LSTM that it has not without AVX512."""
        of_cpu = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
        cast = of_cpu and isinstance(self.rnn, nn.LSTM) and torch.is_autocast_enabled("cpu")
        return cast and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class MinGRUMixer(Mixer):
    """A projected minGRU."""

    num_states = 1

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.rnn = MinGRU(config.d_model, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.d_model, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        h, h_n = self.rnn(x, None if state is None else state[0][None], reset)
        return self.projection(h), [h_n[0]]


class AttentionMixer(Mixer):
    """Causal attention within a document over the last `context_length` positions.

    The state holds those positions' keys and values (before the rotary embedding) and, per
    position, how many document starts lie between it and the end of what was read so far.
    """

    num_states = 3

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        d, heads = config.d_model, config.num_heads
        if d % heads or d // heads % 2:
            raise ValueError(
                f"num_heads: must divide d_model into even parts, got num_heads={heads} and "
                f"d_model={d}"
            )
        self.heads, self.context = heads, config.context_length
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.projection = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        time, batch, d = x.shape
        q, k, v = self.qkv(x).view(time, batch, 3, self.heads, -1).permute(2, 1, 3, 0, 4)
        starts = x.new_zeros(batch, time, dtype=torch.int64) if reset is None else reset.long()
        document = starts.cumsum(1)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
            document = torch.cat((-state[2], document), 1)
        total = k.shape[2]
        key, query = (
            torch.arange(total, device=x.device),
            torch.arange(total - time, total, device=x.device),
        )
        q, keys = _rotate(q, query), _rotate(k, key)
        if state is None and reset is None and time <= self.context + 1:
            y = nnf.scaled_dot_product_attention(q, keys, v, is_causal=True)  # the fused kernel
        else:
            distance = query[:, None] - key
            visible = (distance >= 0) & (distance <= self.context)
            visible = visible & (document[:, -time:, None] == document[:, None, :])
            y = nnf.scaled_dot_product_attention(q, keys, v, attn_mask=visible[:, None])
        y = y.permute(2, 0, 1, 3).reshape(time, batch, d)
        kept = slice(max(0, total - self.context), None)
        age = document[:, -1:] - document[:, kept]
        return self.projection(y), [k[:, :, kept], v[:, :, kept], age]


class LinearAttentionMixer(Mixer):
    """V (norm(y) · silu(G x)) of what a head reads from a matrix that every token writes to:

        S_t = f_t R S_{t-1} + k_t v_tᵀ,    y_t = S_tᵀ q_t

    Queries Q x, keys K r and values V r of r = x · sigmoid(I x), queries and keys of length 1, x_t
    mixed with x_{t-1} as in `KRUMixer`; f_t = sigmoid(F x_t + c), a number per head; R turns by one
    position of a rotary embedding. So it is a linear KRU with A = f_t R, B = 1 and inputs of rank
    one; as only a number of A depends on t, CHUNK steps at a time are a few products. (Linear
    attention: Katharopoulos et al., ICML 2020; gated: Yang et al. and Dao and Gu, both ICML 2024.)

    A head has hidden_size / H values, and half as many keys, rounded down to pairs.
    """

    CHUNK = 32
    num_states = 2

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        d, heads = config.d_model, config.num_heads
        self.heads = heads
        keys, values = 2 * max(1, config.hidden_size // (4 * heads)), config.hidden_size // heads
        if not values:
            raise ValueError(
                f"hidden_size: must be at least num_heads={heads} for linear attention, got "
                f"{config.hidden_size}"
            )
        self.query = nn.Linear(d, heads * keys, bias=False)
        self.key = nn.Linear(d, heads * keys, bias=False)
        self.value = nn.Linear(d, heads * values)
        self.forget = nn.Linear(d, heads)
        self.gate = nn.Linear(d, heads * values)
        self.input_gate = nn.Linear(d, d)
        self.shift = nn.Parameter(torch.empty(d))
        self.scale = nn.Parameter(torch.empty(heads * values))
        self.reset_parameters()
        self.projection = nn.Linear(heads * values, d, bias=False)

    def reset_parameters(self) -> None:
        """Start without a share of the token before, with heads that forget within 3 to 300 steps;
        the layers draw their own weights."""
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.forget.weight)
        with torch.no_grad():
            steps = torch.logspace(0.5, 2.5, self.heads)
            self.forget.bias.copy_(-torch.log(torch.expm1(1 / steps)))  # f = exp(-1 / steps)

    def forward(self, x: Tensor, state, reset) -> tuple[Tensor, list[Tensor]]:
        x, last = shifted(x, self.shift, None if state is None else state[1], reset)
        read = x * self.input_gate(x).sigmoid()
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3)  # (B, H, T, ·)
            for y in (self.query(x), self.key(read), self.value(read))
        )
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(dtype) for y in (nnf.normalize(q, dim=-1), nnf.normalize(k, dim=-1), v))
        decay = nnf.logsigmoid(self.forget(x).to(dtype)).permute(1, 2, 0)
        starts = x.new_zeros(x.shape[1], x.shape[0], dtype=torch.bool) if reset is None else reset
        s = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state[0]
        if len(x) > 1:
            position = torch.arange(len(x), device=x.device) % self.CHUNK
            q, k = _rotate(q, position), _rotate(k, position)
        chunks = [
            tensor.split(self.CHUNK, dim)
            for tensor, dim in ((q, 2), (k, 2), (v, 2), (decay, 2), (starts, 1))
        ]
        read_out = []
        for chunk in zip(*chunks):
            y, s = _attend_linearly(s, *chunk)
            read_out.append(y)
        y = torch.cat(read_out, 2)
        y = nnf.rms_norm(y, y.shape[-1:]).permute(2, 0, 1, 3).flatten(-2) * self.scale
        gate = nnf.silu(self.gate(x))
        return self.projection(y.to(gate.dtype) * gate), [s, last]


def _attend_linearly(
    s: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """y `(B, H, T, V)` and the state `(B, H, K, V)` after T steps, from that before, queries and
    keys that are rotated by their position here, log f `(B, H, T)`, and where documents start
    `(B, T)`."""
    time = q.shape[-2]
    position = torch.arange(time, device=q.device)
    document = start.long().cumsum(1)
    decay = decay.masked_fill(start[:, None], 0).cumsum(-1)  # of the own document; log
    since = decay[..., :, None] - decay[..., None, :]
    visible = (position[:, None] >= position) & (document[:, :, None] == document[:, None])
    weight = since.masked_fill(~visible[:, None], -torch.inf).exp()
    old = decay.masked_fill(document[:, None] > 0, -torch.inf).exp()[..., None]
    s = _rotate(s.mT, position.new_full((1,), -1)).mT  # as if it were written at position 0
    y = ((q @ k.mT) * weight) @ v + old * (q @ s)
    s = old[..., -1:, :] * s + (weight[..., -1, :, None] * k).mT @ v
    return y, s if time == 1 else _rotate(s.mT, position.new_full((1,), 1 - time)).mT


def _rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of `x (B, H, T, E)` at `position (T,)`."""
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def mixer_of(config: LanguageModelConfig, block: int = 0) -> Mixer:
    """A new mixer of the kind that the config names for a block."""
    if block in config.linear_attention:
        return LinearAttentionMixer(config)
    kinds = {
        "kru": KRUMixer,
        "krulstm": KRULSTMMixer,
        "mingru": MinGRUMixer,
        "transformer": AttentionMixer,
    }
    return kinds.get(config.model, RNNMixer)(config)
