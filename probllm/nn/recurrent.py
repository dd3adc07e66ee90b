"""A recurrent encoder: tanh networks, LSTMs or GRUs, in one direction or both, in any number of layers.

Padding is skipped, wherever it stands: the real positions of each row are moved to the front in their order, the
backward direction reads each row reversed within its own length, and the states move back. So no packed sequences are
needed: on one CPU core, forward and backward in ms against packed ones, 8 rows of 24 words and 100 units 3.2 to 9.0, 32
rows and 200 units 52 to 60, 64 rows of 100 words 397 to 739 (equal where a third is padding); and on a GPU nothing
waits for the lengths.
Sources: Hochreiter and Schmidhuber (1997); Cho et al. (2014); variational dropout, Gal and Ghahramani (2016).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probllm.nn.embeddings import as_embedding
from probllm.nn.encoder import Encoder, Inputs, check_dropout, check_mask, check_positive, in_transform, zero_padding

_CELLS: dict[str, type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentEncoder(Encoder):
    """A recurrent network over the embedded positions.

    Args:
        embedding: an encoder of the single positions, or a vocabulary size.
        hidden: units of each direction; ``dim`` is this, or twice this when bidirectional.
        layers: number of layers.
        cell: ``"rnn"`` (tanh), ``"lstm"`` or ``"gru"``.
        bidirectional: read the sentence both ways; otherwise a state depends on the past alone.
        dropout: probability of dropping a unit, in the input of every layer and in the output, at all positions of a
            row at once (variational dropout).
    """

    def __init__(
        self,
        embedding: Encoder | int,
        hidden: int = 200,
        layers: int = 1,
        cell: Literal["rnn", "lstm", "gru"] = "lstm",
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(hidden=hidden, layers=layers)
        check_dropout("dropout", dropout)
        if cell not in _CELLS:
            raise ValueError(f"cell is {cell!r}; expected one of {sorted(_CELLS)}")
        self.embedding = as_embedding(embedding, hidden)
        self.dim = hidden * (2 if bidirectional else 1)
        self.cell, self.bidirectional, self.dropout = cell, bidirectional, dropout
        sizes = [self.embedding.dim] + [self.dim] * (layers - 1)
        self.forwards = nn.ModuleList(recurrent_layer(cell, size, hidden) for size in sizes)
        self.backwards = nn.ModuleList(recurrent_layer(cell, size, hidden) for size in sizes) if bidirectional else None

    def forward(self, inputs: Inputs, mask: Tensor | None = None) -> Tensor:
        """States ``[B, L, dim]``; where ``mask`` is False a position is skipped as if it were not there."""
        states: Tensor = self.embedding(inputs, mask)
        check_mask(mask, states.shape[:2])
        length = states.shape[1]
        steps = torch.arange(length, device=states.device)
        reverse = (length - 1 - steps).unsqueeze(0)
        if mask is not None:
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            reverse = (mask.sum(1, keepdim=True) - 1 - steps) % length
            states = _reorder(states, order)
        for i, forwards in enumerate(self.forwards):
            states = self._drop(states)
            read = _run(self.cell, forwards, states)
            if self.backwards is not None:
                # The reversal within a row's length is its own inverse.
                back = _reorder(_run(self.cell, self.backwards[i], _reorder(states, reverse)), reverse)
                read = torch.cat([read, back], -1)
            states = read
        states = self._drop(states)
        if mask is not None:
            states = _reorder(states, torch.argsort(order, dim=1))
        return zero_padding(states, mask)

    def _drop(self, states: Tensor) -> Tensor:
        """Variational dropout: ``[B, L, n]`` times one mask ``[B, 1, n]``."""
        if not self.training or self.dropout == 0:
            return states
        return states * F.dropout(states.new_ones(states.shape[0], 1, states.shape[2]), self.dropout)


def recurrent_layer(cell: str, size: int, hidden: int) -> nn.RNNBase:
    """One layer in one direction: orthogonal recurrent weights, Xavier's for the input, biases 0, forget gates open."""
    layer = _CELLS[cell](size, hidden, batch_first=True)
    for name, weight in layer.named_parameters():
        for gate in weight.detach().chunk(len(weight) // hidden):
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(gate)
            else:
                nn.init.zeros_(gate)
    if cell == "lstm":
        # The forget gate starts open: Jozefowicz et al. (2015).
        assert isinstance(layer.bias_ih_l0, Tensor)
        layer.bias_ih_l0.detach()[hidden : 2 * hidden] = 1.0
    return layer


def _reorder(states: Tensor, order: Tensor) -> Tensor:
    """``states[b, order[b, t]]`` for states ``[B, L, n]`` and order ``[B or 1, L]``."""
    return states.gather(1, order.unsqueeze(-1).expand(states.shape[0], -1, states.shape[2]))


def _run(cell: str, layer: nn.Module, inputs: Tensor) -> Tensor:
    """Hidden states ``[B, L, H]`` of one direction of one layer."""
    weight = layer.weight_hh_l0
    assert isinstance(weight, Tensor)
    if in_transform(inputs, weight):
        return _step_by_step(cell, layer, inputs)[0]
    states: Tensor = layer(inputs)[0]
    return states


def recurrence(
    cell: str, layer: nn.Module, inputs: Tensor, state: tuple[Tensor, Tensor], mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer from left to right, on from a state.

    Args:
        cell: ``"rnn"``, ``"lstm"`` or ``"gru"``.
        layer: torch's module of that cell, one layer in one direction.
        inputs: ``[B, L, n]``.
        state: hidden state and cell before the first position, ``[B, H]`` each; without a cell, the hidden state twice.
        mask: ``[B, L]``; a position where it is False leaves the state as it is.
    Returns:
        Hidden states ``[B, L, H]``, and the state after the last position.
    """
    weight = layer.weight_hh_l0
    assert isinstance(weight, Tensor)
    if mask is not None or in_transform(inputs, weight, *state):
        return _step_by_step(cell, layer, inputs, state, mask)
    hidden, memory = (part.unsqueeze(0).to(inputs.dtype).contiguous() for part in state)
    if cell == "lstm":
        states, (hidden, memory) = layer(inputs, (hidden, memory))
        return states, (hidden[0], memory[0])
    states, hidden = layer(inputs, hidden)
    return states, (hidden[0], hidden[0])


def _step_by_step(
    cell: str,
    layer: nn.Module,
    inputs: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The recurrence in plain operations, gates in torch's order (LSTM: i, f, g, o; GRU: r, z, n)."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    )
    from_input = F.linear(inputs, w_ih, b_ih)  # [B, L, gates * H]
    h = c = from_input.new_zeros(inputs.shape[0], w_hh.shape[1])
    if state is not None:
        h, c = state
    states = []
    for t, x in enumerate(from_input.unbind(1)):
        before = h, c
        u = F.linear(h, w_hh, b_hh)
        if cell == "rnn":
            h = torch.tanh(x + u)
        elif cell == "lstm":
            i, f, g, o = (x + u).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u.chunk(3, -1)
            r, z = torch.sigmoid(x_r + u_r), torch.sigmoid(x_z + u_z)
            h = (1 - z) * torch.tanh(x_n + r * u_n) + z * h
        if mask is not None:
            real = mask[:, t, None]
            h, c = torch.where(real, h, before[0]), torch.where(real, c, before[1])
        states.append(h)
    return torch.stack(states, 1), (h, c if cell == "lstm" else h)
