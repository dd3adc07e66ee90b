"""Biaffine scores against their formula, arc by arc."""

import pytest
import torch
import torch.nn.functional as F

from probllm.nn import BiaffineArcs, from_config, to_config


def made(**arguments):
    torch.manual_seed(0)
    layer = BiaffineArcs(5, arc_dim=4, num_labels=3, label_dim=2, **arguments).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


STATES = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_an_arcs_score_is_bilinear_in_its_two_words():
    layer = made()
    arcs, root = layer(STATES)
    assert arcs.shape == (2, 4, 4)
    assert root.shape == (2, 4)
    vectors = F.leaky_relu(layer.arcs(STATES), 0.1)
    heads, dependents = vectors[..., :4], vectors[..., 4:]
    for i in range(4):
        for j in range(4):
            h, d = heads[1, i], dependents[1, j]
            torch.testing.assert_close(arcs[1, i, j], h @ layer.weight @ d + layer.bias @ h)
            torch.testing.assert_close(root[1, j], layer.root @ layer.weight @ d + layer.bias @ layer.root)


def test_a_labels_score_is_that_of_the_given_arc_alone():
    layer = made()
    heads = torch.tensor([[2, 0, 2, 1], [0, 3, 1, 3]])
    scores = layer.score_labels(STATES, heads)
    assert scores.shape == (2, 4, 3)
    vectors = F.leaky_relu(layer.labels(STATES), 0.1)
    weight = layer.label_weight.view(3, 3, 3)  # [dependent, label, head]
    one = torch.ones(1, dtype=torch.float64)
    for b in range(2):
        for j in range(4):
            i = heads[b, j]
            h = layer.label_root if i == 0 else vectors[b, i - 1, :2]
            expected = torch.einsum("drh,d,h->r", weight, torch.cat([vectors[b, j, 2:], one]), torch.cat([h, one]))
            torch.testing.assert_close(scores[b, j], expected)


def test_heads_may_have_leading_dimensions():
    layer = made()
    heads = torch.randint(5, (3, 2, 4), generator=torch.Generator().manual_seed(2))
    scores = layer.score_labels(STATES, heads)
    assert scores.shape == (3, 2, 4, 3)
    torch.testing.assert_close(scores[1], layer.score_labels(STATES, heads[1]))


def test_a_config_gives_an_equal_layer():
    layer = made()
    again = from_config(to_config(layer)).double()
    again.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer(STATES), again(STATES), strict=True))


def test_dropout_drops_a_unit_at_all_words_of_a_sentence_at_once():
    layer = made(dropout=0.5).train()
    torch.manual_seed(1)
    dropped, _ = layer._two(layer.arcs, torch.ones(3, 6, 5, dtype=torch.float64))
    assert torch.equal(dropped[:, :1].expand_as(dropped), dropped)
    assert (dropped == 0).any()
    arcs, _ = layer.eval()(STATES)
    torch.testing.assert_close(arcs, made()(STATES)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiaffineArcs(0), "dim is 0"),
        (lambda: BiaffineArcs(3, num_labels=-1), "num_labels is -1"),
        (lambda: BiaffineArcs(3, dropout=1.0), "dropout is 1.0"),
        (lambda: BiaffineArcs(3)(torch.zeros(2, 3, 4)), "states has shape"),
        (lambda: BiaffineArcs(3).score_labels(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)), "no labels"),
        (
            lambda: BiaffineArcs(3, num_labels=1).score_labels(torch.zeros(2, 4, 3), torch.zeros(2, 3).long()),
            r"heads has shape \[2, 3\]; expected \[..., 2, 4\]",
        ),
    ],
)
def test_bad_arguments_raise_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
