"""FSDP2 on two processes: what they learn, keep, write and gather is what one process does.

    python tests/test_sharding.py RANK FOLDER       # one of the two, as the fixture starts them

`fully_shard` splits every parameter along its first dimension: of a complex factor one process has
the real part and the other the imaginary one, of a real one the first has all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from kru_triton import KRU, KRULSTM, unitarity_penalty
from kru_triton.lm.model import LanguageModel, LanguageModelConfig

CASES = {
    "whole": {},
    "blocks": {"nonlinearity": "identity"},
    "layers": {"field": "real"},
    "embedding": {"model": "krulstm"},
    "transformers": {},
}
VOCAB, WEIGHT = 31, 0.1
TOKENS = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
GENERATION = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def make(case):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, d_model=16, hidden_size=12, num_heads=2, **CASES[case])
    if case == "transformers":
        from kru_triton.hf import KRUConfig, KRUForCausalLM

        return KRUForCausalLM(KRUConfig(**sizes))
    return LanguageModel(LanguageModelConfig(**sizes))


def shard(model, case):
    """In units of the size that the case is named after, and the rest as one."""
    for name, module in list(model.named_modules()):
        if (
            (case in ("blocks", "transformers") and name.endswith(("blocks.0", "blocks.1")))
            or (case == "layers" and isinstance(module, KRU | KRULSTM))
            or (case == "embedding" and name == "embedding")
        ):
            fully_shard(module)
    return fully_shard(model)


def learn(model, tokens, mean=float):
    """Loss, penalty and gradient norm of each of four steps."""
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(4):
        optimizer.zero_grad()
        before = unitarity_penalty(model) if step == 1 else None  # on either side of the forward
        if hasattr(model, "lm_head"):
            loss = model(tokens, labels=tokens).loss
        else:
            logits, _ = model(tokens)
            loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        penalty = unitarity_penalty(model) if before is None else before
        (loss + WEIGHT * penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        rows.append([mean(loss.detach()), penalty.item(), norm.item()])
    return rows


@torch.no_grad()
def write(model):
    model.eval()
    if hasattr(model, "lm_head"):
        return model.generate(TOKENS[:2, :5], **GENERATION).tolist()
    with model.decoding():
        logits, state = model(TOKENS[:2, :5])
        for _ in range(6):
            logits, state = model(logits[:, -1:].argmax(-1), state)
    return logits.flatten().tolist()


@torch.no_grad()
def precision_of_factors(own_policy):
    """What a layer computes with where all else is bfloat16."""
    model, found = make("whole"), []
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    full = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
    for block in model.blocks:
        kru = block.mixer.kru
        kru.register_forward_hook(lambda kru, *_: found.append(str(kru.factor0_l0.dtype)))
        if own_policy:
            fully_shard(kru, mp_policy=full)
        fully_shard(block, mp_policy=half)
    fully_shard(model, mp_policy=half)(TOKENS)
    return found


def main(rank: int, folder: Path):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)

    def mean(x):
        dist.all_reduce(x)
        return float(x / 2)

    found = {}
    for case in CASES:
        model = shard(make(case), case)
        rows = learn(model, TOKENS[2 * rank : 2 * rank + 2], mean)
        text = write(model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        if rank == 0:
            torch.save(weights, folder / f"{case}.pt")
        found[case] = {"rows": rows, "text": text}

    with torch.device("meta"):
        model = make("blocks")
    shard(model, "blocks").to_empty(device="cpu")
    torch.manual_seed(rank)  # each process draws others
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found["drawn in place"] = unitarity_penalty(model).item()

    found["precision"] = [precision_of_factors(own_policy) for own_policy in (False, True)]

    model = FullyShardedDataParallel(
        make("whole"), auto_wrap_policy=ModuleWrapPolicy({KRU}), device_id=torch.device("cpu")
    )
    found["fsdp1"] = write(model)
    try:
        unitarity_penalty(model)
    except RuntimeError as error:
        found["freed"] = str(error)

    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(outputs)
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_and_write_what_one_does(case, two):
    folder, found = two
    model = make(case)
    rows = torch.tensor(learn(model, TOKENS))
    assert (torch.tensor(found[case]["rows"]) - rows).abs().max() < 1e-4 * rows.abs().max()
    assert rows[-1, 0] < rows[0, 0] - 0.5
    loaded = make(case)
    loaded.load_state_dict(torch.load(folder / f"{case}.pt"))
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
        assert (a - b).abs().max() < 1e-3, name  # a sign of Adam's where a gradient is rounding
    text, written = torch.tensor(found[case]["text"]), torch.tensor(write(loaded))
    assert (text - written).abs().max() < 1e-4


def test_factors_drawn_into_shards_are_unitary(two):
    assert two[1]["drawn in place"] < 1e-9


def test_a_layer_with_a_policy_of_its_own_keeps_its_factors(two):
    assert two[1]["precision"] == [["torch.bfloat16"] * 2, ["torch.float32"] * 2]


def test_layers_in_the_older_wrapper(two):
    expected = torch.tensor(write(make("whole")))
    assert (torch.tensor(two[1]["fsdp1"]) - expected).abs().max() < 1e-5
    assert "summon_full_params" in two[1]["freed"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
