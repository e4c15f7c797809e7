"""Weights that something else keeps, brings in, wraps or computes, while a model writes."""

import pytest
import torch
from torch.nn.utils import parametrize, prune

transformers = pytest.importorskip("transformers")

from hf_models import FREE, make, padded, tokens_of  # noqa: E402

from kru_triton import KRU  # noqa: E402
from kru_triton.hf import KRUForCausalLM  # noqa: E402
from kru_triton.layers.decoding import why_not_graphed  # noqa: E402
from kru_triton.unitarity import unitarity_penalty  # noqa: E402


@pytest.mark.parametrize("where", ["cpu", "disk", "mixed", "loaded"])
@pytest.mark.parametrize("kind", ["kru", "krulstm"])
def test_an_offloaded_model_writes_the_same(kind, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, (tokens, mask) = make(kind), padded(7, 4)
    options = {**FREE, "max_new_tokens": 6, "attention_mask": mask}
    expected = model.generate(tokens, **options)
    penalty = unitarity_penalty(model).item()
    parts = {"embedding": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "norm": "disk"}
    device_map = {f"model.network.{name}": place for name, place in parts.items()}
    device_map["lm_head"] = "cpu"
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        model = accelerate.disk_offload(model, tmp_path / "off", execution_device="cpu")
    elif where == "mixed":
        options_of_map = {"main_device": "cpu", "offload_dir": tmp_path / "off"}
        model = accelerate.dispatch_model(model, device_map, **options_of_map)
    else:
        model.save_pretrained(tmp_path / "model")
        model = KRUForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
        )
    assert any(p.is_meta for name, p in model.named_parameters() if ".factor" in name)
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        found = model.generate(tokens, **options, **more)
        assert torch.equal(found, make(kind).generate(tokens, **options, **more))
    assert unitarity_penalty(model).item() == pytest.approx(penalty, rel=1e-6)
    assert any(p.is_meta for name, p in model.named_parameters() if ".factor" in name)
    if where in ("mixed", "loaded"):  # without a device map transformers saves no offloaded model
        model.save_pretrained(tmp_path / "saved")
        saved = KRUForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(saved.generate(tokens, **options), expected)


def test_every_module_is_called_at_every_step(model):
    model, calls = make(), {}
    for name, module in model.named_modules():
        calls[name] = 0
        if not isinstance(module, torch.nn.ModuleList):

            def count(*_, name=name):
                calls[name] += 1

            module.register_forward_hook(count)
    model.generate(tokens_of(), max_new_tokens=8, **FREE)
    assert {name for name, count in calls.items() if count < 8} == {"model.network.blocks"}


class Half(torch.nn.Module):
    def forward(self, w):
        return w / 2


class Inside(torch.nn.Module):
    """A wrapper that passes nothing on but calls."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Louder(KRU):
    def forward(self, x, *args, **kwargs):
        return super().forward(3 * x, *args, **kwargs)


def replaced(kru):
    forward = kru.forward
    kru.forward = lambda x, *args, **kwargs: forward(3 * x, *args, **kwargs)


WRAPPINGS = {
    "pre-hook": lambda kru: kru.register_forward_pre_hook(lambda _, args: (3 * args[0], *args[1:])),
    "hook": lambda kru: kru.register_forward_hook(lambda _, args, out: (out[0].abs(), out[1])),
    "replaced": replaced,
    "subclass": lambda kru: setattr(kru, "__class__", Louder),
    "factor": lambda kru: parametrize.register_parametrization(kru, "factor0_l0", Half()),
    "weight_ih": lambda kru: parametrize.register_parametrization(kru, "weight_ih_l0", Half()),
    "weight_norm": lambda kru: torch.nn.utils.parametrizations.weight_norm(kru, "factor1_l0"),
    "pruned": lambda kru: prune.l1_unstructured(kru, "factor0_l0", 0.3),
    "compiled": lambda kru: torch.compile(kru, backend="eager"),
    "inside": Inside,
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_steps_of_a_wrapped_layer_are_those_of_its_own_forward(name):
    network = make().model.network
    mixer, tokens = network.blocks[0].mixer, tokens_of(2, 9)
    with torch.no_grad():
        before, _ = network(tokens)
        wrapped = WRAPPINGS[name](mixer.kru)
        if name in ("compiled", "inside"):
            mixer.kru = wrapped
        expected, _ = network(tokens)
        same = name in ("compiled", "inside", "weight_norm")
        assert ((expected - before).abs().max() < 1e-5) == same
        with network.decoding():
            logits, state = network(tokens[:, :4])
            for t in range(4, 9):
                logits, state = network(tokens[:, t : t + 1], state)
                assert (logits[:, 0] - expected[:, t]).abs().max() < 1e-5
    assert network.num_recurrent_parameters >= 104
    assert unitarity_penalty(network) > 0


@pytest.mark.parametrize("name", ["gate", "input_gate", "norm", "projection", "embedding"])
def test_other_wrapped_modules(name):
    model, tokens = make(), tokens_of()
    expected, network = model.generate(tokens, max_new_tokens=6, **FREE), model.model.network
    logits, _ = network(tokens)
    owner = network if name == "embedding" else network.blocks[0].mixer
    setattr(owner, name, Inside(getattr(owner, name)))
    assert torch.equal(model.generate(tokens, max_new_tokens=6, **FREE), expected)
    assert torch.equal(network(tokens)[0], logits)  # its head is the embedding


def test_weights_that_change_while_decoding():
    """Other tensors in the place of those that a step was made of."""
    network, tokens = make().model.network, tokens_of(2, 3)
    with torch.no_grad(), network.decoding():
        _, state = network(tokens)
        network(tokens[:, :1], state)
        kru = network.blocks[0].mixer.kru
        kru.factor0_l0 = torch.nn.Parameter(2 * kru.factor0_l0)
        found, _ = network(tokens[:, :1], state)
    assert (found - network(tokens[:, :1], state)[0]).abs().max() < 1e-5


def test_why_no_graph_stands_for_a_step():
    def reason(change):
        network = make().model.network
        change(network)
        return why_not_graphed(network)

    in_place = "its weights are on ['cpu'], not on one GPU"
    assert reason(lambda network: None) == in_place
    assert reason(lambda network: network.register_forward_hook(print)) == "the model has hooks"
    assert "blocks.1.mixer.gate has" in reason(
        lambda network: network.blocks[1].mixer.gate.register_forward_pre_hook(print)
    )
    assert "the forward of blocks.0.mixer.kru is replaced" in reason(
        lambda network: replaced(network.blocks[0].mixer.kru)
    )
    assert "norm is a Inside" in reason(lambda n: setattr(n, "norm", Inside(n.norm)))
    assert "blocks.0.mixer.kru is a ParametrizedKRU" in reason(
        lambda network: WRAPPINGS["factor"](network.blocks[0].mixer.kru)
    )
    assert reason(lambda network: network.to("meta")) == in_place.replace("cpu", "meta")
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert reason(lambda network: None) == "every module has a hook"
    hook.remove()


def test_an_averaged_copy_writes():
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    expected = model.generate(tokens_of(), max_new_tokens=5, **FREE)
    assert torch.equal(averaged.module.generate(tokens_of(), max_new_tokens=5, **FREE), expected)
