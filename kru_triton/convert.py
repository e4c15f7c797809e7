"""From the layers of torch.nn to Kronecker ones: a start for training, not the same function.

    nn.RNN  -> KRU, real       h_t = σ(W h_{t-1} + U x_t + b)    W ≈ W_0 ⊗ … ⊗ W_{F-1}
    nn.LSTM -> KRULSTM         the same for the matrix of each gate

Everything else is kept. Of W is kept its nearest Kronecker product (Van Loan and Pitsianis, 1993),
which for a W that knew of no such structure is little: `bench/NOTES.md` says what remains, and how
fast training recovers.
"""

import torch
from torch import Tensor, nn

from kru_triton.kronecker import nearest_kronecker
from kru_triton.layers.kru import KRU
from kru_triton.layers.lstm import KRULSTM


@torch.no_grad()
def from_torch(
    rnn: nn.RNN | nn.LSTM,
    factors=None,
    *,
    num_heads: int = 1,
    recompute: int = 0,
    backend: str = "auto",
    precision: str = "auto",
) -> KRU | KRULSTM:
    """The Kronecker layers nearest to `rnn`, with the same calling convention.

    An orthogonal RNN is an `nn.RNN` whose `weight_hh` is orthogonal: its nearest factors are
    multiples of orthogonal ones only if it is a Kronecker product.

    Args:
        rnn: any layers, directions, nonlinearity, bias, dropout, `batch_first`, dtype and device.
        factors, num_heads, recompute, backend, precision: as in `KRU`. With heads, what lies
            outside of the diagonal blocks of a recurrent matrix is dropped.

    Returns:
        A `KRU` of the real field for an `nn.RNN`, a `KRULSTM` for an `nn.LSTM`; new parameters,
        trainable where theirs were: a factor where the recurrent matrix was, the bias where either
        of the two was.

    Raises:
        TypeError: `rnn` is neither; ValueError: an LSTM with projections, sizes that do not fit, or
        weights that are not finite.

    Example:
        >>> kru = from_torch(torch.nn.RNN(8, 12), factors=(3, 4))
        >>> kru(torch.zeros(5, 2, 8))[0].shape, kru.num_recurrent_parameters
        (torch.Size([5, 2, 12]), 25)
    """
    if not isinstance(rnn, nn.RNN | nn.LSTM):
        raise TypeError(
            f"rnn: must be a torch.nn.RNN or torch.nn.LSTM, got {type(rnn).__name__}; a GRU has no "
            "Kronecker counterpart here"
        )
    if rnn.proj_size:
        raise ValueError(
            f"rnn: has projections (proj_size={rnn.proj_size}), which KRULSTM does not; put a "
            "Linear layer behind it"
        )
    options = {
        name: getattr(rnn, name)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
    }
    options |= {"bidirectional": rnn.bidirectional, "num_heads": num_heads, "factors": factors}
    options |= {"recompute": recompute, "backend": backend, "precision": precision}
    weight = rnn.weight_hh_l0
    options |= {"device": weight.device, "dtype": weight.dtype}
    layers: KRU | KRULSTM
    if isinstance(rnn, nn.LSTM):
        layers = KRULSTM(**options)
    else:
        layers = KRU(**options, field="real", nonlinearity=rnn.nonlinearity)
    for name, parameter in layers.named_parameters():
        kind, _, suffix = name.partition("_l")
        kinds = {"weight_ih": ["weight_ih"], "bias": ["bias_ih", "bias_hh"]}
        with torch.enable_grad():  # a parametrized weight is computed where it is read
            sources = [getattr(rnn, f"{k}_l{suffix}") for k in kinds.get(kind, ["weight_hh"])]
        parameter.requires_grad_(any(source.requires_grad for source in sources))
        if kind in kinds:
            parameter.copy_(sum(sources))
        elif kind == "factor0":
            blocks = _diagonal_blocks(sources[0], num_heads)
            nearest = nearest_kronecker(blocks, layers.factor_shapes)
            for f, w in enumerate(nearest):
                getattr(layers, f"factor{f}_l{suffix}").copy_(w)
    return layers.train(rnn.training)


def _diagonal_blocks(weight: Tensor, heads: int) -> Tensor:
    """`(gates·N, N)` as planar `(1, gates·heads, N/heads, N/heads)`."""
    size = weight.shape[1] // heads
    blocks = weight.view(-1, heads, size, heads, size)  # gate, head, row, head, column
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(1, -1, size, size)
