"""What transformers' own tests ask of a model with a recurrent state.

Every way of decoding with the cache equals the one without it, beams reorder it, logits of single
steps equal those of one pass, and text ends where it should.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_models import BOS, FREE, every_model, make, padded, tokens_of  # noqa: E402

from kru_triton.hf import CACHE  # noqa: E402
from kru_triton.train.export import pretrained_tokenizer  # noqa: E402
from kru_triton.train.text.tokenizer import ByteTokenizer  # noqa: E402

DECODING = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "nucleus": {"do_sample": True, "top_p": 0.7, "temperature": 0.8, "num_return_sequences": 2},
    "beams": {"num_beams": 4},
    "beams-returned": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "ended": {"eos_token_id": [3, 7, 11], "min_new_tokens": 3},
    "beams-ended": {"num_beams": 3, "eos_token_id": [3, 7, 11], "early_stopping": True},
}


@pytest.mark.parametrize("name", DECODING)
def test_with_the_cache_as_without(model, name):
    options = {**FREE, "max_new_tokens": 12, **DECODING[name]}
    tokens, mask = padded(7, 4)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outs.append(model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*outs)
    assert outs[0].shape[1] > 7


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_with_the_cache_as_without_for_every_model(kind, options):
    model, (tokens, mask) = make(kind), padded(5, 3)
    options = {**FREE, "max_new_tokens": 12, **options}
    cached = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(
        cached, model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    )


def test_generation_equals_one_pass_over_the_whole_text(model):
    output = model.generate(
        tokens_of(),
        max_new_tokens=80,
        return_dict_in_generate=True,
        output_logits=True,
        **FREE,
    )
    stepwise = torch.stack(output.logits, 1)
    whole = model(output.sequences[:, :-1]).logits[:, 6:]
    assert torch.equal(whole.argmax(-1), output.sequences[:, 7:])
    assert (stepwise - whole).abs().max() < 1e-5
    assert output.sequences[:, 7:].unique().numel() > 4  # not one token over and over


@torch.no_grad()
def brute_force_beams(network, prompt, beams, count):
    """The `beams` best texts, each scored from scratch: pairs of tokens and log-probability."""
    kept = [(prompt, 0.0)]
    for _ in range(count):
        longer = []
        for tokens, score in kept:
            text = torch.tensor([tokens])
            logits = network(text, None, text == BOS)[0][0, -1]
            for token, log_p in enumerate(logits.log_softmax(-1).tolist()):
                longer.append(([*tokens, token], score + log_p))
        kept = sorted(longer, key=lambda pair: -pair[1])[:beams]
    return kept


def test_beams_are_those_of_a_brute_force_search(model):
    prompt = tokens_of(1, 4)
    expected = brute_force_beams(model.model.network, prompt[0].tolist(), 4, 7)
    output = model.generate(
        prompt,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=7,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **FREE,
    )
    assert output.sequences.tolist() == [tokens for tokens, _ in expected]
    scores = torch.tensor([score for _, score in expected])
    assert (output.sequences_scores - scores).abs().max() < 1e-5


def test_generation_from_nothing_starts_with_bos_and_ends_with_eos(model):
    torch.manual_seed(0)
    written = model.generate(do_sample=True, max_new_tokens=300)
    assert written[0, 0] == BOS
    assert written[0, -1] == BOS
    assert (written[0, 1:-1] != BOS).all()


def test_tokens_stream_as_they_are_written(model):
    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    written = model.generate(tokens_of(1), max_new_tokens=6, streamer=streamer, **FREE)
    assert streamer.ended
    assert [len(piece) for piece in streamer.pieces] == [7] + [1] * 6
    assert [token for piece in streamer.pieces for token in piece] == written[0].tolist()


@pytest.fixture(scope="module")
def writer():
    """A model that writes ASCII bytes, and its tokenizer."""
    model = make(vocab_size=257, bos_token_id=256)
    model.generation_config.suppress_tokens = list(range(128, 257))
    return model, pretrained_tokenizer(ByteTokenizer())


@pytest.mark.parametrize("beams", [1, 3])
def test_text_ends_with_a_stop_string(writer, beams):
    model, tokenizer = writer
    prompt = tokenizer("for", return_tensors="pt")

    def written(**kwargs):
        output = model.generate(**prompt, max_new_tokens=20, num_beams=beams, **kwargs)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    text = written()
    assert len(text) == 23
    stop = text[10:12]
    stopped = written(stop_strings=[stop], tokenizer=tokenizer)
    assert len(stopped) < 23
    assert stopped.index(stop, 3) == len(stopped) - 2
    if beams == 1:
        assert text.startswith(stopped)
        assert written(token_healing=True, tokenizer=tokenizer) == text  # a byte has no longer form
        pipe = transformers.pipeline("text-generation", model, tokenizer=tokenizer)
        options = {"stop_strings": [stop], "tokenizer": tokenizer, "do_sample": False}
        assert pipe("for", max_new_tokens=20, **options)[0]["generated_text"] == stopped


def test_no_cache_where_use_cache_is_none(model):
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, **FREE}
    outputs = [model.generate(tokens_of(), use_cache=x, **options) for x in (True, None)]
    expected, logits = (torch.stack(output.logits) for output in outputs)
    assert (logits - expected).abs().max() < 1e-5
    assert CACHE not in outputs[1]


def test_assisted_generation_is_refused(model):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens_of(1), assistant_model=model, max_new_tokens=3)
