import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from probllm.models import CausalLM, CRFTagger
from probllm.nn import RecurrentEncoder, TransformerDecoder
from probllm.nn.embeddings import CharacterCNN, WordEmbedding, WordRepresentation
from probllm.training.optimisers import Optimisers, name_of


class Net(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.words = nn.Embedding(20, 4, sparse=sparse)
        self.bag = nn.EmbeddingBag(20, 4, sparse=sparse, mode="sum")
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)

    def forward(self, ids):
        return self.out(self.norm(self.hidden(self.words(ids).sum(1) + self.bag(ids)))).square().sum()


def built(net, optimiser="adamw", rate=0.1, decay=0.5):
    return Optimisers(net.parameters(), {"net": net}, optimiser, rate, decay)


def twins(seed=0):
    torch.manual_seed(seed)
    dense, sparse = Net(), Net(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


class Counting(torch.optim.SGD):
    """Keeps a number in its groups, as optimisers without a schedule do; its steps shrink with it."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / group["k"]
        return super().step(closure)


IDS = torch.tensor([[1, 2, 2], [3, 3, 3]])


def test_decay_shrinks_weights_but_not_biases_norms_and_embeddings():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimisers = built(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimisers.step()
    for name, parameter in net.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("hidden.weight", "out.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_each_parameter_is_trained_once_and_frozen_ones_never():
    net = Net()
    net.norm.requires_grad_(False)
    optimisers = Optimisers([*net.parameters(), *net.parameters()], {"": net}, "adamw", 0.1, 0.0)
    held = [p for one in optimisers.optimisers for group in one.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 6


def test_an_entrys_own_rate_and_decay_hold_and_the_schedule_scales_every_rate():
    net = Net()
    entries = [{"params": [net.out.bias], "lr": 0.3, "weight_decay": 0.25}, net.out.weight]
    optimisers = Optimisers(entries, {"": net}, "adamw", 0.1, 0.01)
    for factor in (0.5, 0.1):
        optimisers.set_rate(factor)
        (one,) = optimisers.optimisers
        found = {name_of(group["params"][0], {"": net}): group for group in one.param_groups}
        assert found["out.bias"]["lr"] == pytest.approx(0.3 * factor)
        assert found["out.bias"]["weight_decay"] == 0.25
        assert found["out.weight"]["lr"] == pytest.approx(0.1 * factor)
        assert found["out.weight"]["weight_decay"] == 0.01


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "adagrad", "sgd", lambda groups: torch.optim.Adam(groups)])
def test_parameters_with_sparse_gradients_train_under_every_optimiser(optimiser):
    _, net = twins()
    optimisers = built(net, optimiser, decay=0.0)
    untouched = net.words.weight[7].clone()
    before = net.words.weight[2].clone()
    first = net(IDS)
    for _ in range(5):
        loss = net(IDS)
        loss.backward()
        assert net.words.weight.grad.is_sparse
        optimisers.clip(1.0)
        optimisers.step()
        net.zero_grad()
    assert net(IDS) < first
    assert torch.equal(net.words.weight[7], untouched)
    assert not torch.equal(net.words.weight[2], before)


def test_adagrad_moves_sparse_and_dense_gradients_alike():
    dense, sparse = twins()
    for net in (dense, sparse):
        optimisers = built(net, "adagrad", decay=0.0)
        for _ in range(3):
            net.zero_grad()
            net(IDS).backward()
            optimisers.clip(0.7)
            optimisers.step()
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@given(seed=st.integers(0, 1000), limit=st.floats(0.01, 100))
def test_clipping_is_torchs_and_the_same_for_sparse_gradients(seed, limit):
    dense, sparse = twins(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (4, 3), generator=generator)
    norms = []
    for net in (dense, sparse):
        net(ids).backward()
        norms.append(built(net).clip(limit))
    reference, _ = twins(seed)
    reference(ids).backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), limit)
    assert norms == pytest.approx([float(expected)] * 2, rel=1e-5)
    for one, other, third in zip(dense.parameters(), sparse.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, third.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.grad.to_dense(), third.grad, rtol=1e-4, atol=1e-6)


def test_no_clipping_leaves_the_gradient_and_tells_its_norm():
    net, _ = twins()
    net(IDS).backward()
    before = [p.grad.clone() for p in net.parameters()]
    norm = built(net).clip(None)
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_a_sparse_gradient_that_the_optimiser_does_not_take_is_named():
    net = Net()
    net.words.weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (20, 4))
    with pytest.raises(ValueError, match=r"the gradient of net\.words\.weight is sparse"):
        built(net).clip(1.0)


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "adagrad", "sgd", lambda groups: Counting(groups)])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_state_given_back_continues_as_if_nothing_had_happened(optimiser, sparse):
    one, other = twins()[sparse], twins()[sparse]
    first = built(one, optimiser)

    def steps(net, optimisers, count):
        for _ in range(count):
            net.zero_grad()
            net(IDS).backward()
            optimisers.step()

    steps(one, first, 3)
    other.load_state_dict(one.state_dict())
    second = built(other, optimiser)
    tensors, scalars = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, scalars)
    steps(one, first, 3)
    steps(other, second, 3)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def muons(modules):
    optimisers = Optimisers([p for m in modules.values() for p in m.parameters()], modules, "muon", 0.1, 0.5)
    return {
        name_of(parameter, modules): group["weight_decay"]
        for one in optimisers.optimisers
        for group in one.param_groups
        for parameter in group["params"]
        if isinstance(one, torch.optim.Muon)
    }


def test_muon_trains_the_hidden_matrices_and_adamw_the_tables_heads_norms_and_biases():
    layer = ["attention.project", "attention.output", "feedforward.input", "feedforward.output"]
    decoder = TransformerDecoder(9, dim=8, layers=1, heads=2, positions="learned")
    for tied in (True, False):
        assert muons({"": CausalLM(decoder, tied=tied)}) == {f"decoder.layers.0.{name}.weight": 0.5 for name in layer}
    words = WordRepresentation([WordEmbedding(9, 4), CharacterCNN(5, 3, 4)])
    tagger = CRFTagger(RecurrentEncoder(words, hidden=4), 3)
    assert set(muons({"a": tagger})) == {
        f"a.encoder.{name}" for name, p in tagger.encoder.named_parameters() if p.ndim == 2 and "parts" not in name
    }
    assert len(muons({"a": tagger})) > 1
    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert muons({"a": tagger, "b": plain}).keys() >= {"b.0.weight", "b.2.weight"}
    assert "b.3.weight" not in muons({"b": plain})
    assert muons({"": Net()}) == {"hidden.weight": 0.5}
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    tied[2].weight = tied[0].weight
    assert muons({"": tied}) == {"1.weight": 0.5}


def test_muon_steps_along_the_nearest_orthogonal_matrix_at_the_size_of_adamws():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 48, bias=False), nn.Linear(48, 2))
    weight = net[0].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    Optimisers(net.parameters(), {"": net}, "muon", 0.1, 0.0).step()
    step = before - weight.detach()
    assert float((step * (u @ v)).sum() / step.norm() / (u @ v).norm()) > 0.97
    assert float(step.square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.15)


def test_the_tables_of_our_encoders_decay():
    words = WordRepresentation([WordEmbedding(9, 4), CharacterCNN(5, 3, 4)])
    tagger = CRFTagger(RecurrentEncoder(words, hidden=4), 3)
    optimisers = Optimisers(tagger.parameters(), {"": tagger}, "adamw", 0.1, 0.5)
    (one,) = optimisers.optimisers
    decayed = {name_of(p, {"": tagger}) for group in one.param_groups if group["weight_decay"] for p in group["params"]}
    assert {"encoder.embedding.parts.0.weight", "encoder.embedding.parts.1.embedding"} <= decayed
    assert decayed == {name for name, p in tagger.named_parameters() if p.ndim > 1}
