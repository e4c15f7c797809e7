"""The ops by the names and in the order `(B, T, …)` that they had once, for exported programs.

An `ExportedProgram` holds the ops that it was traced with. These are written out as the ones of
today where such a program is loaded and run.
"""

import torch

from kru_triton.ops.library import library


def _turned(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.transpose(0, 1)


def _scan(x, a, b, beta, h_0, reset, lengths, tokens, *how):
    x = _turned(x) if tokens is None else x
    rest = (beta, h_0, _turned(reset), lengths, _turned(tokens))
    return torch.ops.kru_triton.recurrence(x, a, b, *rest, *how)


def _linear_scan(x, a, b, h_0, reset, lengths, block, *how):
    rest = (None, h_0, _turned(reset), lengths, None, "identity", *how, block)
    return torch.ops.kru_triton.linear_recurrence(_turned(x), a, b, *rest)


def _lstm_scan(x, a, b, h_0, c_0, reset, lengths, *how):
    rest = (h_0, c_0, _turned(reset), lengths, "tanh", *how)
    return torch.ops.kru_triton.lstm_recurrence(_turned(x), a, b, *rest)


def _define(function, name: str, between: str, results: str) -> None:
    arguments = f"Tensor x_proj, Tensor a, Tensor b, {between}, str backend, str precision"
    library.define(f"{name}({arguments}) -> ({results})")
    library.impl(name, function, "CompositeImplicitAutograd")


_CUTS = "Tensor? reset, Tensor? lengths"
_STATE = f"Tensor? beta, Tensor? h_0, {_CUTS}, Tensor? tokens, str nonlinearity"
_define(_scan, "scan", _STATE, "Tensor, Tensor")
_define(_linear_scan, "linear_scan", f"Tensor? h_0, {_CUTS}, int block", "Tensor, Tensor")
_STATES = f"Tensor? h_0, Tensor? c_0, {_CUTS}"
_define(_lstm_scan, "lstm_scan", _STATES, "Tensor, Tensor, Tensor, Tensor")
