"""The language model and its baselines: state, causality, gradients, groups, sizes, learning."""

import dataclasses

import pytest
import torch
import torch.nn.functional as nnf

from kru_triton.lm.mixers import LinearAttentionMixer
from kru_triton.lm.model import LanguageModel, match_parameters
from kru_triton.lm.presets import MODELS, PRESETS, LanguageModelConfig

every_model = pytest.mark.parametrize("model", MODELS)
every_mixer = pytest.mark.parametrize("model", [*MODELS, "hybrid", "gated state", "forgets"])
VOCAB = 31
LIMIT = 1e-11  # roundings of float64


def make(model, **kwargs):
    """A small model; `hybrid`: a KRU whose second block is linear attention; or one whose state has
    a gate."""
    torch.manual_seed(0)
    gates = {"gated state": "rotation", "forgets": "sigmoid"}
    if model in gates:
        model, kwargs = "kru", {"state_gate": gates[model], **kwargs}
    if model == "hybrid":
        model, kwargs = "kru", {"linear_attention": (1,), **kwargs}
    options = dict(vocab_size=VOCAB, d_model=16, hidden_size=12, num_heads=2, context_length=5)
    return LanguageModel(LanguageModelConfig(**{**options, "model": model, **kwargs})).double()


def tokens_of(batch=3, time=11, seed=0):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@every_mixer
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
def test_chunks_with_the_state_carried_equal_one_run(model, with_reset):
    lm, tokens = make(model), tokens_of()
    reset = None
    if with_reset:
        reset = torch.zeros(3, 11, dtype=torch.bool)
        reset[0, [0, 4]] = reset[1, 10] = reset[2, 2] = True
    whole, whole_state = lm(tokens, None, reset)
    pieces, state, start = [], None, 0
    for size in (1, 3, 2, 5):
        piece = slice(start, start + size)
        logits, state = lm(tokens[:, piece], state, None if reset is None else reset[:, piece])
        pieces.append(logits)
        start += size
    assert (torch.cat(pieces, 1) - whole).abs().max() < LIMIT
    if model != "transformer":  # whose cached positions before a reset are dead weight
        for a, b in zip(state, whole_state, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_an_lstm_is_trained_under_autocast_where_onednn_has_none_of_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    lm, tokens = make("lstm").float(), tokens_of()
    reset = tokens == tokens[0, 4]
    whole, _ = lm(tokens, None, reset)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = lm(tokens, None, reset)
        further, _ = lm(tokens, state, reset)
    assert all(s.dtype == torch.float32 for s in state)
    assert (logits - whole).abs().max() < 0.02
    further.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters())


@every_mixer
def test_recompute_changes_nothing_but_the_order_of_sums(model):
    """Chunks of four of eleven steps, run again in the backward."""
    tokens, results = tokens_of(), []
    reset = torch.zeros(3, 11, dtype=torch.bool)
    reset[0, [0, 4]] = reset[1, 10] = reset[2, 2] = True
    for recompute in (0, 4):
        lm = make(model, recompute=recompute)
        _, state = lm(tokens_of(seed=1))
        logits, out = lm(tokens, [s.detach() for s in state], reset)
        loss = nnf.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        grads = torch.autograd.grad(loss, list(lm.parameters()))
        results.append([logits, *grads, *(out if model != "transformer" else [])])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < LIMIT


def test_recompute_keeps_one_chunk_of_the_blocks():
    """Bytes that autograd keeps beside the x and the states that each chunk begins with."""

    def kept(recompute):
        lm, sizes = make("kru", num_layers=3, recompute=recompute), {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits, _ = lm(tokens_of(time=200))
        assert logits.requires_grad
        return sum(sizes.values())

    assert kept(10) < kept(0) / 5


@every_mixer
def test_the_state_matters(model):
    lm, tokens = make(model), tokens_of()
    _, state = lm(tokens)
    assert (lm(tokens, state)[0] - lm(tokens)[0]).abs().max() > 1e-4


@every_mixer
def test_reset_equals_a_fresh_start(model):
    lm, tokens = make(model), tokens_of()
    _, state = lm(tokens_of(seed=1))
    reset = torch.zeros(3, 11, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = True
    logits, _ = lm(tokens, state, reset)
    carried, _ = lm(tokens, state)
    assert (logits[0] - lm(tokens[:1])[0][0]).abs().max() < LIMIT
    assert (logits[1, :4] - carried[1, :4]).abs().max() < LIMIT
    assert (logits[1, 4:] - lm(tokens[1:2, 4:])[0][0]).abs().max() < LIMIT
    assert (logits[2] - carried[2]).abs().max() < LIMIT
    assert (logits[1, 4:] - carried[1, 4:]).abs().max() > 1e-4


@every_mixer
def test_causality(model):
    lm, tokens = make(model), tokens_of()
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    difference = (lm(tokens)[0] - lm(changed)[0]).abs().amax((0, 2))
    assert (difference[:6] == 0).all()
    assert (difference[6:8] > 1e-6).all()


@every_mixer
def test_rows_do_not_see_each_other(model):
    lm, tokens = make(model), tokens_of()
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % VOCAB
    difference = (lm(tokens)[0] - lm(changed)[0]).abs().amax((1, 2))
    assert difference[0] == difference[2] == 0
    assert difference[1] > 1e-3


@pytest.mark.parametrize("chunk", [4, 128])
def test_linear_attention_is_a_recurrence_of_matrices(monkeypatch, chunk):
    """The definition, step by step, behind a state and with documents that start."""
    monkeypatch.setattr(LinearAttentionMixer, "CHUNK", chunk)
    config = LanguageModelConfig(d_model=6, hidden_size=21, num_heads=2, linear_attention=(0,))
    torch.manual_seed(0)
    mixer = LinearAttentionMixer(config).double()
    for p in mixer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x, before = torch.randn(2, 11, 3, 6, dtype=torch.float64)
    reset = torch.zeros(3, 11, dtype=torch.bool)
    reset[0, 0] = reset[1, [3, 5]] = reset[2, 10] = True
    _, state = mixer(before, None, None)
    got, (s, last) = mixer(x, state, reset)

    keys, values = 4, 10  # of a head: 21 // 2 values, and half of them rounded down to pairs
    angle = 10000.0 ** (-torch.arange(keys // 2).double() / (keys // 2))
    turn = torch.cat((torch.diag(angle.cos()), torch.diag(angle.sin())), 0)
    turn = torch.cat((turn, torch.cat((-torch.diag(angle.sin()), torch.diag(angle.cos())), 0)), 1)
    for row in range(3):
        matrix, seen = state[0][row], state[1][row]
        for t in range(11):
            if reset[row, t]:
                matrix, seen = torch.zeros_like(matrix), torch.zeros_like(seen)
            token = x[t, row] + mixer.shift * (seen - x[t, row])
            seen = x[t, row]
            read = token * mixer.input_gate(token).sigmoid()
            q = nnf.normalize(mixer.query(token).view(2, keys), dim=-1)
            k = nnf.normalize(mixer.key(read).view(2, keys), dim=-1)
            v, f = mixer.value(read).view(2, values), mixer.forget(token).sigmoid()
            matrix = f[:, None, None] * (turn.T @ matrix) + k[:, :, None] * v[:, None]
            y = nnf.rms_norm((matrix.mT @ q[..., None])[..., 0], (values,)).flatten()
            y = mixer.projection(y * mixer.scale * nnf.silu(mixer.gate(token)))
            assert (y - got[t, row]).abs().max() < 1e-6
        assert (matrix - s[row]).abs().max() < 1e-6
        assert (seen - last[row]).abs().max() == 0


def test_linear_attention_has_its_place():
    for bad in ({"linear_attention": (2,)}, {"linear_attention": (-1,)}):
        with pytest.raises(ValueError, match="linear_attention: must be blocks from 0 to 1"):
            make("kru", **bad)
    with pytest.raises(ValueError, match="and frame='plain'"):
        make("kru", frame="plain", num_layers=1, linear_attention=(0,))
    with pytest.raises(ValueError, match="hidden_size: must be at least num_heads=2"):
        make("gru", hidden_size=1, linear_attention=(0,))
    report = make("kru", linear_attention=(0,)).backend_report()
    assert report == make("kru").backend_report() != make("gru").backend_report()
    assert make("gru", linear_attention=(1,)).num_recurrent_parameters == 3 * 12 * 12


def test_transformer_sees_its_context_and_no_further():
    lm, tokens = make("transformer", num_layers=1), tokens_of()
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    difference = (lm(tokens)[0] - lm(changed)[0]).abs().amax((0, 2))
    assert (difference[:6] > 1e-8).all()  # position 5 is context_length = 5 later
    assert (difference[6:] == 0).all()


@every_mixer
@pytest.mark.parametrize("kwargs", [{}, {"gated": False, "nonlinearity": "modrelu"}], ids=["", "b"])
def test_gradient_reaches_every_parameter(model, kwargs):
    lm, tokens = make(model, **kwargs), tokens_of()
    _, state = lm(tokens)
    logits, _ = lm(tokens, [s.detach() for s in state])
    nnf.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, p in lm.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.count_nonzero() > 0, name


@every_mixer
def test_parameter_groups(model):
    lm = make(model)
    groups = lm.parameter_groups(lr=1e-3, recurrent_lr=1e-4, weight_decay=0.1)
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in lm.parameters()}
    for group in groups:
        names = [n for n, p in lm.named_parameters() if any(p is q for q in group["params"])]
        assert (group["name"] == "embeddings") == (names == ["embedding.weight"])
        if group["weight_decay"]:
            assert group["weight_decay"] == 0.1
            assert all(p.dim() == 2 for p in group["params"])
            assert not any("factor" in n for n in names)
        else:
            assert all(p.dim() < 2 or "factor" in n for n, p in zip(names, group["params"]))
        is_factor = ["factor" in n for n in names]
        assert all(is_factor) or not any(is_factor)
        assert group["lr"] == (1e-4 if all(is_factor) else 1e-3)
    assert any(g["weight_decay"] for g in groups)
    assert (model in ("kru", "krulstm", "hybrid", "gated state", "forgets")) == any(
        g["lr"] == 1e-4 for g in groups
    )
    torch.optim.AdamW(groups)


def test_matrices_of_a_plain_frame_are_those_between_the_tokens():
    for model, matrices in {"kru": [], "lstm": ["blocks.0.mixer.rnn.weight_hh_l0"]}.items():
        lm = make(model, frame="plain", num_layers=1)
        groups = {g["name"]: g["params"] for g in lm.parameter_groups(1e-3, 1e-4, 0.1)}
        found = [n for n, p in lm.named_parameters() if any(p is q for q in groups["embeddings"])]
        assert [n.rpartition(".mixer.")[2] for n in found] == [
            f"{'kru' if model == 'kru' else 'rnn'}.weight_ih_l0",
            "projection.weight",
        ]
        found = [
            n for n, p in lm.named_parameters() if any(p is q for q in groups.get("matrices", []))
        ]
        assert found == matrices


@every_model
def test_match_parameters(model):
    config = LanguageModelConfig(model=model, d_model=64, hidden_size=64, num_heads=1)
    for count in (100_000, 1_000_000):
        matched = match_parameters(config, count)
        assert abs(LanguageModel(matched).num_parameters - count) <= 0.1 * count
        kept = {"d_model": 0, "hidden_size": 0}
        assert dataclasses.asdict(matched) | kept == dataclasses.asdict(config) | kept
    with pytest.raises(ValueError, match=r"match_params: d_model=.* gives .* the nearest to 100 "):
        match_parameters(config, 100)


@pytest.mark.parametrize("preset", PRESETS)
@every_model
def test_presets_build(preset, model):
    config = dataclasses.replace(PRESETS[preset], model=model)
    if config.frame == "plain" and model == "transformer":
        with pytest.raises(ValueError, match="one recurrent layer"):
            LanguageModel(config)
        return
    with torch.device("meta"):
        lm = LanguageModel(config)
    assert lm.num_parameters > 0
    recurrent = lm.num_recurrent_parameters
    without = model in ("mingru", "transformer")  # whose gates do not read the state
    assert recurrent == 0 if without else 0 < recurrent < lm.num_parameters
    if model in ("kru", "krulstm") and preset != "ptb":  # a small part of all
        assert recurrent < 0.2 * lm.num_parameters


def test_presets_grow():
    sizes = []
    for name in ("tiny", "small", "base", "large"):
        with torch.device("meta"):
            sizes.append(LanguageModel(PRESETS[name]).num_parameters)
    assert sizes == sorted(set(sizes))


@every_model
def test_the_head_is_the_embedding(model):
    """Moving one row of the embedding moves that token's logits alone, if it is not read."""
    lm = make(model)
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    before, _ = lm(tokens)
    with torch.no_grad():
        lm.embedding.weight[7] += torch.randn(16, generator=torch.Generator().manual_seed(0))
    after, _ = lm(tokens)
    moved = (after - before).abs().amax((0, 1)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [7]
    matrices = [p for p in lm.parameters() if VOCAB in p.shape]
    assert len(matrices) == 1


@pytest.mark.parametrize("model", ["kru", "krulstm", "transformer"])
def test_an_offloaded_model_reads_and_decodes_the_same(model):
    """The head is the embedding, whose weight is elsewhere but while it is called."""
    accelerate = pytest.importorskip("accelerate")
    lm, tokens = make(model).eval(), tokens_of()
    with torch.no_grad():
        expected, _ = lm(tokens)
        lm = accelerate.cpu_offload(lm, execution_device="cpu")
        assert lm.embedding.weight.is_meta
        assert (lm(tokens)[0] - expected).abs().max() < LIMIT
        with lm.decoding():
            _, state = lm(tokens[:, :9])
            for t in (9, 10):
                logits, state = lm(tokens[:, t : t + 1], state)
                assert (logits[:, 0] - expected[:, t]).abs().max() < LIMIT


@every_model
def test_state_sizes_are_constant(model):
    lm = make(model)
    state, sizes = None, []
    for _ in range(8):  # a transformer's cache is full after context_length = 5
        _, state = lm(tokens_of(time=1), state)
        assert all(s.shape[0] == 3 for s in state)
        sizes.append([tuple(s.shape) for s in state])
    assert sizes[-1] == sizes[-2] == sizes[-3]
    if model != "transformer":
        assert sizes[0] == sizes[-1]
    _, state = lm(tokens_of(time=30))
    assert [tuple(s.shape) for s in state] == sizes[-1]


@pytest.mark.parametrize("model", ["kru", "krulstm"])
def test_a_state_holds_no_sequence_and_outlives_a_call_without_tokens(model):
    lm = make(model)
    _, state = lm(tokens_of(time=50))
    for s in state:  # h and c of an LSTM lie side by side; nothing that grows with time
        assert s.untyped_storage().nbytes() <= 2 * s.numel() * s.element_size()
    for before in (None, state):
        logits, after = lm(tokens_of(time=0), before)
        assert logits.shape == (3, 0, VOCAB)
        expected = [torch.zeros_like(s) for s in state] if before is None else before
        torch.testing.assert_close(after, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model", ["kru", "krulstm", "lstm", "transformer"])
def test_overfits_a_string(model):
    """200 bytes with repeats, so that a model without a state cannot reach the bound."""
    text = ("the quick brown fox jumps over the lazy dog; " * 4 + "a different ending, once")[:200]
    data = torch.tensor(list(text.encode()))[None]
    torch.manual_seed(0)
    config = LanguageModelConfig(
        model=model, d_model=32, num_layers=1, hidden_size=64, context_length=32
    )
    lm = LanguageModel(config)
    optimizer = torch.optim.AdamW(lm.parameter_groups(5e-3, 5e-3, 0.0))

    def loss_of(data):
        logits, _ = lm(data[:, :-1])
        return nnf.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())

    first = loss_of(data).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(data) + 1e-3 * lm.unitarity_penalty()
        loss.backward()
        optimizer.step()
    assert first > 2
    assert loss_of(data).item() < 0.1
    with torch.no_grad():  # the bound needs memory: without it, bigrams of this text cost more
        alone, _ = lm(data[0, :-1, None])
        no_memory = nnf.cross_entropy(alone.flatten(0, 1), data[0, 1:])
    assert no_memory > 0.3


def test_dropout_acts_in_training_only():
    lm, tokens = make("kru", dropout=0.5), tokens_of()
    assert not torch.equal(lm(tokens)[0], lm(tokens)[0])
    lm.eval()
    assert torch.equal(lm(tokens)[0], lm(tokens)[0])


@every_model
def test_backend_report_is_one_line(model):
    report = make(model).backend_report()
    assert "\n" not in report
    assert ("torch.nn" in report) == (model not in ("kru", "krulstm"))


def test_unitarity_penalty():
    lm = make("kru", num_layers=2, radius=1.0)
    assert lm.unitarity_penalty() < 1e-10
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "factor0" in name:
                p.mul_(2)
    assert lm.unitarity_penalty() > 1
    assert make("lstm").unitarity_penalty() == 0


@pytest.mark.parametrize(
    ("kind", "match", "changed"),
    [
        (ValueError, "model: must be one of 'kru', .* got 'mamba'", dict(model="mamba")),
        (ValueError, "vocab_size: must be at least 1, got 0", dict(vocab_size=0)),
        (ValueError, "d_model: must be at least 1, got -3", dict(d_model=-3)),
        (ValueError, "num_layers: must be at least 1, got 0", dict(num_layers=0)),
        (ValueError, "context_length: must be at least 1, got 0", dict(context_length=0)),
        (ValueError, "recompute: must be a number of steps, or 0 .* got -1", dict(recompute=-1)),
        (ValueError, "factors: the row counts multiply to 9", dict(factors=(3, 3))),
        (
            ValueError,
            "num_heads: must divide d_model .* num_heads=3 and d_model=128",
            dict(model="transformer", num_heads=3),
        ),
    ],
)
def test_errors_when_built(kind, match, changed):
    with pytest.raises(kind, match=match):
        LanguageModel(LanguageModelConfig(**changed))


@every_model
def test_errors_of_calls(model):
    lm, tokens = make(model), tokens_of()
    with pytest.raises(ValueError, match=r"tokens: must be \(B, T\), got shape \(11,\)"):
        lm(tokens[0])
    with pytest.raises(
        ValueError, match=r"tokens: must be \(B, T, D\), rows of .* if not integers"
    ):
        lm(tokens.float())
    _, state = lm(tokens)
    with pytest.raises(ValueError, match=f"state: expected {len(state)} tensors, got "):
        lm(tokens, [*state, state[0]])
