"""Kronecker Recurrent Units: the operation, the layers, the algebra and the diagnostics."""

from kru_triton import diagnostics
from kru_triton.convert import from_torch
from kru_triton.kronecker import group_factors, kron_dense, kron_matvec, nearest_kronecker
from kru_triton.layers.kru import KRU, KRUCell
from kru_triton.layers.lstm import KRULSTM
from kru_triton.ops import batch_first  # noqa: F401 (defines the ops of older programs)
from kru_triton.ops.linear import kru_linear_scan
from kru_triton.ops.lstm import kru_lstm_scan, why_not_triton_lstm
from kru_triton.ops.scan import kru_embedding_scan, kru_scan, kru_step, why_not_triton
from kru_triton.unitarity import unitarity_penalty, unitary_

__version__ = "0.1.0"

__all__ = [
    "KRU",
    "KRULSTM",
    "KRUCell",
    "diagnostics",
    "from_torch",
    "group_factors",
    "kron_dense",
    "kron_matvec",
    "kru_embedding_scan",
    "kru_linear_scan",
    "kru_lstm_scan",
    "kru_scan",
    "kru_step",
    "nearest_kronecker",
    "unitarity_penalty",
    "unitary_",
    "why_not_triton",
    "why_not_triton_lstm",
]

OF_TRANSFORMERS = ("KRUCache", "KRUConfig", "KRUForCausalLM", "KRUModel")


def __getattr__(name: str):
    """The Hugging Face classes, imported with transformers when they are first asked for."""
    if name in OF_TRANSFORMERS:
        from kru_triton import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
