"""A language model with its tokenizer, of a run directory or of a folder of train/export.py."""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from kru_triton.lm.model import LanguageModel, LanguageModelConfig
from kru_triton.train.run import checkpoints
from kru_triton.train.run.device import pick_device
from kru_triton.train.run.settings import UserError
from kru_triton.train.text.record import run_tokenizer
from kru_triton.train.text.tokenizer import ByteTokenizer, FileTokenizer, read_tokenizer

BOS = "<|endoftext|>"  # the name of BOS in exported byte tokenizers


def load_model(
    where: str, device: str, backend: str
) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    """A model in evaluation mode, its tokenizer, and the folder both were read from.

    Args:
        where: a run directory (the newest good checkpoint is taken), a folder that train/export.py
            wrote, or `hub:org/name`.
    """
    found = load_exported if is_exported(where) else load_run
    model, tokenizer, folder = found(where, backend)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens, the model of {folder} "
            f"{model.config.vocab_size}: tokenizer.json is another model's"
        )
    return ready(model, pick_device(device)), tokenizer, folder


def load_run(where: str, backend: str) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    checkpoint, corrupt = checkpoints.load_latest(Path(where))
    for path, reason in corrupt:
        print(f"warning: {path} is corrupt: {reason}", file=sys.stderr)
    if checkpoint is None:
        raise UserError(
            f"no {'good ' if corrupt else ''}checkpoint under {Path(where, 'checkpoints')}; give "
            "the --run-dir of a run of train/lm.py, or a folder of train/export.py"
        )
    try:
        settings = {**checkpoint.trainer["model_config"], "backend": backend}
        settings["factors"] = tuple(settings["factors"]) if settings["factors"] else None
        model = LanguageModel(LanguageModelConfig(**settings))
        model.load_state_dict(checkpoint.tensors["model"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{checkpoint.path} holds no language model of this version ({reason})"
        ) from error
    return model, run_tokenizer(Path(where)), checkpoint.path


def load_exported(
    where: str, backend: str
) -> tuple[LanguageModel, ByteTokenizer | FileTokenizer, Path]:
    try:
        from transformers.utils.logging import disable_progress_bar

        from kru_triton.hf import KRUForCausalLM
    except ImportError as error:
        raise UserError(
            f"{where} is a Hugging Face folder: pip install 'kru-triton[hf]'"
        ) from error
    name = where.removeprefix("hub:")
    disable_progress_bar()
    try:
        model = KRUForCausalLM.from_pretrained(name, backend=backend, dtype=torch.float32)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"{where}: {error}") from error
    if not model.config.tie_word_embeddings:
        raise UserError(f"{where}: has a head of its own (tie_word_embeddings=False); use generate")
    tokenizer = read_tokenizer(name)
    if tokenizer.bytes_of == [*(bytes([b]) for b in range(256)), BOS.encode()]:
        tokenizer = ByteTokenizer()
    return model.model.network, tokenizer, Path(name)


def is_exported(where: str) -> bool:
    """Whether `where` names a Hugging Face folder and not a run."""
    config = Path(where, "config.json")
    if where.startswith("hub:"):
        return True
    if Path(where, "checkpoints").exists() or not config.exists():
        return False
    try:
        return "model_type" in dict(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{config} is no configuration of a model ({error})") from error


def ready(model: LanguageModel, device: torch.device) -> LanguageModel:
    """The model on the device and in evaluation mode; UserError where it cannot run there."""
    try:
        model = model.to(device).eval()
        with torch.no_grad():  # one token, so that what cannot run says so now
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model: {error}") from error
    return model
