"""Turn a run into a Hugging Face folder: configuration, weights, tokenizer, model card.

    RUN_DIR/checkpoints/step-N -> OUT: config.json, model.safetensors, tokenizer.json, README.md

Token ids are those of the training. The start-of-document token is `<|endoftext|>`: the tokenizer
puts it before each text, and generation ends with it.

    python train/export.py runs/lm exported
    python -c "import kru_triton.hf; from transformers import pipeline; \\
        print(pipeline('text-generation', 'exported')('def ', max_new_tokens=50))"

Exit codes: 0; 2 bad arguments, or nothing there to export; 130 Ctrl-C.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from kru_triton.hf import KRUForCausalLM, model_card
from kru_triton.train.run.script import one_line
from kru_triton.train.run.settings import UserError
from kru_triton.train.text.load import BOS, is_exported, load_model
from kru_triton.train.text.tokenizer import byte_values


@dataclass
class ExportConfig:
    run_dir: tyro.conf.Positional[str]
    """The run directory of train/lm.py; its newest good checkpoint is exported."""
    out: tyro.conf.Positional[str]
    """The folder to write; new, or empty."""


def pretrained_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of a run for transformers, with the same ids; BOS stands before each text."""
    json_text = getattr(tokenizer, "json", None)
    backend = Tokenizer.from_str(json_text) if json_text else byte_tokenizer()
    name = backend.id_to_token(tokenizer.bos)
    if name is None:
        name = BOS
        backend.add_special_tokens([AddedToken(BOS, special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, tokenizer.bos)]
    )
    if (backend.token_to_id(name), backend.get_vocab_size()) != (
        tokenizer.bos,
        tokenizer.vocab_size,
    ):
        raise UserError(
            f"tokenizer: BOS would be token {backend.token_to_id(name)} of "
            f"{backend.get_vocab_size()}, in the run it is {tokenizer.bos} of "
            f"{tokenizer.vocab_size}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=name,
        eos_token=name,
        pad_token=name,
        padding_side="left",
        split_special_tokens=True,  # text that spells BOS is text
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b."""
    backend = Tokenizer(models.BPE(vocab=byte_values(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def training_summary(run_dir: Path) -> str:
    """What the run's summary says, as a paragraph; empty for a run that has not ended."""
    path = run_dir / "summary.json"
    if not path.exists():
        return ""
    summary = json.loads(path.read_text())
    settings = json.loads((run_dir / "config.json").read_text())
    data = " ".join(settings["data"])
    return (
        f"Trained by `train/lm.py --data {data}` for {summary['steps']:,} steps, "
        f"{summary['tokens']:,} tokens: {summary['val/bpb']:.4f} bits per byte on held-out text "
        f"(gzip -9: {summary['gzip_bpb']:.4f}, xz: {summary['xz_bpb']:.4f}).\n"
    )


def export(config: ExportConfig) -> Path:
    """Write the folder; returns its path."""
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another or remove it")
    if is_exported(config.run_dir):
        raise UserError(f"{config.run_dir} is an exported folder already; give a run directory")
    model, tokenizer, _ = load_model(config.run_dir, "cpu", "auto")
    try:
        causal_lm = KRUForCausalLM.from_language_model(model, bos_token_id=tokenizer.bos)
    except ValueError as error:
        raise UserError(f"{config.run_dir} cannot be exported: {error}") from error
    tokens = pretrained_tokenizer(tokenizer)
    card = model_card(causal_lm, training_summary(Path(config.run_dir)))
    out.mkdir(parents=True, exist_ok=True)
    try:
        (out / "README.md").write_text(card, encoding="utf-8")
        causal_lm.save_pretrained(out)
        tokens.save_pretrained(out)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)  # half a folder is none
        if isinstance(error, SafetensorError):
            raise UserError(f"{out} cannot be written: {error}") from error
        raise
    return out


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    config = tyro.cli(ExportConfig, description=description + "\n\n    python" + examples)
    disable_progress_bar()
    with one_line():
        out = export(config)
        print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")


if __name__ == "__main__":
    main()
