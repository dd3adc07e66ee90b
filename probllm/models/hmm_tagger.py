"""Hidden Markov taggers of the first and second order: a story of tags and symbols, estimated by counting or by EM.

    z_1 ~ initial,  z_2 ~ second[z_1],  z_t ~ transition[z_{t-2}, z_{t-1}],  x_t ~ emission[z_t]      (order 2)
    z_1 ~ initial,                      z_t ~ transition[z_{t-1}],           x_t ~ emission[z_t]      (order 1)

given the length. The symbols x are words that are known and classes of those that are not (see ``data.word_classes``),
so that each emission row is a law over everything that a text may hold. Rabiner (1989), "A tutorial on hidden Markov
models"; Brants (2000), "TnT: a statistical part-of-speech tagger". Counts are smoothed in ``hmm_smoothing``; EM stands
in ``hmm_estimation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probllm.distributions.higher_order_crf import HigherOrderCRF
from probllm.distributions.linear_chain_crf import LinearChainCRF
from probllm.math.masks import lengths_from_mask, mask_from_lengths
from probllm.models.hmm_estimation import (
    allowed_scores,
    divergence,
    in_batches,
    log_evidence,
    map_rows,
    maximise_expectation,
    total,
    variational_bayes,
    weighted,
)
from probllm.models.hmm_laws import Rows, SymbolsOfChain, SymbolsOfTags, chain, emission_scores
from probllm.models.hmm_smoothing import count, smooth
from probllm.models.model import Batch, Model

STEP_TOKENS = 4096  # padding counted, of a batch in an E step
TAGGED_WEIGHT = 20.0  # copies of the tagged text in the prior of EM: with fewer, what is learnt from it is unlearnt


class HMMTagger(Model):
    """A generative tagger.

    A batch is ``{"inputs": symbols or {"symbols": ...}, "mask": ..., "tags": ...}``, all ``[B, L]``; a tag of -1 is not
    known, and so are all where ``tags`` is missing. Where all tags are known the program observes ``tags`` and
    ``symbols``; where some are not it sums them out: ``symbols`` is the law of a hidden chain, and ``tags`` are drawn
    from their posterior at no cost (masked; ``poutine.block`` hides the site from NUTS, which knows no discrete ones).
    Without ``inputs`` both are sampled.

    Args:
        num_tags: K.
        num_symbols: S.
        order: how many tags back a tag depends on, 1 or 2.
        bayesian: probabilities have Dirichlet priors in the program, and Dirichlet posteriors in the guide. Then
            ``predict``, ``marginals``, ``log_prob`` take the posterior's means for the probabilities, and ``loss`` is
            one draw's estimate of the negative bound, per sequence.
        transition_concentration, emission_concentration: of the symmetric Dirichlet priors, also in EM.
        parents: for each symbol the next more general class, or itself (``WordClasses``), to smooth counted emissions.
    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        num_tags: int,
        num_symbols: int,
        order: int = 2,
        bayesian: bool = False,
        transition_concentration: float = 0.1,
        emission_concentration: float = 0.01,
        parents: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        for name, size in (("num_tags", num_tags), ("num_symbols", num_symbols)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, value in (
            ("transition_concentration", transition_concentration),
            ("emission_concentration", emission_concentration),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if parents is not None and not (
            len(parents) == num_symbols and 0 <= min(parents) <= max(parents) < num_symbols
        ):
            raise ValueError(f"parents must be {num_symbols} symbols, each from 0 to {num_symbols - 1}")
        self.num_tags, self.num_symbols, self.order, self.bayesian = num_tags, num_symbols, order, bayesian
        self.transition_concentration, self.emission_concentration = transition_concentration, emission_concentration
        self.parents = parents
        # Log probabilities up to a constant a row; if Bayesian, logs of the posterior's concentrations.
        self.initial = nn.Parameter(0.5 * torch.randn(num_tags))
        self.second = nn.Parameter(0.5 * torch.randn(num_tags, num_tags)) if order == 2 else None
        self.transition = nn.Parameter(0.5 * torch.randn((num_tags,) * (order + 1)))
        self.emission = nn.Parameter(0.5 * torch.randn(num_tags, num_symbols))

    # The Pyro program.

    def forward(self, batch: Batch) -> Tensor:
        tags: Tensor
        symbols, tags, lengths = self._read(batch)
        rows = self._sites(self._prior()) if self.bayesian else self.rows()
        real = mask_from_lengths(lengths, tags.shape[-1])
        some, every = bool((tags >= 0)[real].any()), bool((tags >= 0)[real].all())
        unknown = torch.full_like(tags, -1) if every else tags  # known tags rule others out, unless they are the sample
        law = SymbolsOfChain(rows, allowed_scores(unknown, self.num_tags), lengths)
        with self.plate(batch):
            if some and not every:
                pyro.factor("known_tags", law.tags.log_partition)
            if symbols is not None and not every:
                pyro.sample("symbols", law, obs=symbols)
                tags = pyro.sample("tags", law.posterior(symbols).mask(False))
                return tags
            tags = pyro.sample("tags", law.tags, obs=tags if every else None)
            pyro.sample("symbols", SymbolsOfTags(rows.emission, tags, real), obs=symbols)
            return tags

    def guide(self, batch: Batch) -> None:
        """Dirichlet laws of the probabilities if Bayesian, and the exact posterior of tags that are not known."""
        symbols, tags, lengths = self._read(batch)
        rows = self._sites(map_rows(torch.exp, self._tables())) if self.bayesian else self.rows()
        if symbols is not None and bool((tags < 0)[mask_from_lengths(lengths, tags.shape[-1])].any()):
            with self.plate(batch):
                law = SymbolsOfChain(rows, allowed_scores(tags, self.num_tags), lengths)
                pyro.sample("tags", law.posterior(symbols).mask(False))

    def _sites(self, concentrations: Rows) -> Rows:
        """Log probabilities, drawn row by row from Dirichlet laws."""
        names = Rows(*Rows._fields)  # type: ignore[arg-type]

        def draw(name: str, table: Tensor) -> Tensor:
            row: Tensor = pyro.sample(name, dist.Dirichlet(table).to_event(table.ndim - 1))
            if row.ndim > table.ndim and row.shape[-table.ndim - 1] != 1:
                row = row.unsqueeze(-table.ndim - 1)  # Predictive(parallel=True) leaves no place for the data's plate
            return row.clamp_min(torch.finfo(row.dtype).tiny).log()

        return map_rows(lambda table, name: draw(name, table), concentrations, names)

    # The verbs.

    def rows(self) -> Rows:
        """Log probabilities of each step of the story: the estimate, or the logs of the posterior's means."""
        return map_rows(lambda table: table.log_softmax(-1), self._tables())

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the symbols and the known tags, ``[B]``, in nats; tags not known are summed out."""
        return self._log_prob(self.rows(), batch)

    def log_posterior(self, batch: Batch) -> Tensor:
        """Log probability of the known tags given the symbols, ``[B]``, in nats: what a discriminative tagger gives."""
        untagged = {key: value for key, value in batch.items() if key != "tags"}
        rows = self.rows()
        return self._log_prob(rows, batch) - self._log_prob(rows, untagged)

    def loss(self, batch: Batch) -> Tensor:
        """Mean of ``-log_prob``; if Bayesian, at probabilities drawn from the guide, + KL(guide, prior) / data_size."""
        if not self.bayesian:
            return -self.log_prob(batch).mean()
        posterior = map_rows(torch.exp, self._tables())
        tiny = torch.finfo(posterior.initial.dtype).tiny
        rows = map_rows(lambda table: dist.Dirichlet(table).rsample().clamp_min(tiny).log(), posterior)
        log_prob = self._log_prob(rows, batch)
        return divergence(posterior, self._prior()) / (self.data_size or len(log_prob)) - log_prob.mean()

    def posterior(self, batch: Batch) -> LinearChainCRF | HigherOrderCRF:
        """The exact law of the tags given the symbols and the known tags."""
        symbols, tags, lengths = self._read(batch)
        if symbols is None:
            return chain(self.rows(), allowed_scores(tags, self.num_tags), lengths)
        return SymbolsOfChain(self.rows(), allowed_scores(tags, self.num_tags), lengths).posterior(symbols)

    def predict(self, batch: Batch, decoding: Literal["viterbi", "posterior"] = "viterbi") -> Tensor:
        """Tags ``[B, L]``: the best sequence, or at each position the most probable tag; 0 at padding."""
        untagged = {key: value for key, value in batch.items() if key != "tags"}
        if decoding == "viterbi":
            return self.posterior(untagged).mode
        if decoding != "posterior":
            raise ValueError(f"decoding must be 'viterbi' or 'posterior', got {decoding!r}")
        return self.marginals(untagged).argmax(-1)

    def marginals(self, batch: Batch) -> Tensor:
        """Probability of each tag at each position given all symbols, ``[B, L, K]``; 0 at padding."""
        return self.posterior({key: value for key, value in batch.items() if key != "tags"}).marginals

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``[n, B, L]`` draws from the posterior of the tags; from their prior if the batch has but a ``mask``."""
        if batch is None:
            raise ValueError("batch is None: a tagger needs symbols, or a mask that says how long the sequences are")
        return self.posterior({key: value for key, value in batch.items() if key != "tags"}).sample((n,))

    # Estimation.

    @torch.no_grad()
    def estimate(self, data: Any, iterations: int = 100, tolerance: float = 1e-5) -> list[dict[str, float]]:
        """Estimate the probabilities from data in which all, some or no tags are known (-1, or no ``tags``).

        All known: smoothed counts. Some: EM from the smoothed counts of what is known, which weigh in the prior too.
        None: EM from the present weights, random at first. If Bayesian: the exact posterior where all are known, else
        variational Bayes.

        Args:
            data: a Dataset of examples ``{"inputs": ..., "tags": ...}``.
            iterations: of EM, at most.
            tolerance: stop when an iteration gains less than this part of the objective.
        Returns:
            one dict for the counts, or for each iteration: ``loss`` and ``penalised_loss``, with the log prior, per
            sequence in nats; if Bayesian both are the negative bound.
        Raises:
            ValueError: for no data, or examples without symbols or with ids out of range.
        """
        if not len(data):
            raise ValueError("data is empty: an estimate needs at least one sequence")
        sequences = self._sequences(data)
        counts = count(sequences, self.num_tags, self.num_symbols, self.order)
        known = torch.cat([tags for _, tags in sequences]) >= 0
        some, every = bool(known.any()), bool(known.all())
        batches = in_batches(sequences, STEP_TOKENS)
        prior = self._prior(dtype=torch.float64, device="cpu")
        if every and self.bayesian:
            self._set(map_rows(lambda n, c: (n + c).log(), counts, prior))
            loss = -float(log_evidence(counts, prior)) / len(data)
            return [{"loss": loss, "penalised_loss": loss}]
        smoothed = smooth(counts, self.parents)
        if self.bayesian:
            random = map_rows(lambda table: table.double().cpu().exp(), self._tables())
            start = map_rows(torch.add, counts, prior) if some else random
            posterior, history = variational_bayes(start, prior, batches, iterations, tolerance)
            self._set(map_rows(torch.log, posterior))
        elif every:
            self._set(smoothed)
            log_likelihood = float(total(map_rows(torch.mul, counts, smoothed)))
            return [{"loss": -log_likelihood / len(data)}]
        else:
            start = smoothed if some else map_rows(lambda table: table.double().cpu(), self.rows())
            if some:
                prior = map_rows(torch.add, prior, weighted(counts, smoothed, TAGGED_WEIGHT))
            rows, history = maximise_expectation(start, prior, batches, iterations, tolerance)
            self._set(rows)
        return [{"loss": -a / len(data), "penalised_loss": -b / len(data)} for a, b in history]

    def _log_prob(self, rows: Rows, batch: Batch) -> Tensor:
        symbols, tags, lengths = self._read(batch)
        allowed = allowed_scores(tags, self.num_tags)
        real = mask_from_lengths(lengths, tags.shape[-1])
        scores = allowed if symbols is None else allowed + emission_scores(rows.emission, symbols)
        if bool((tags >= 0)[real].all()):
            return chain(rows, scores, lengths).score(tags)
        return chain(rows, scores, lengths).log_partition

    def _tables(self) -> Rows:
        return Rows(self.initial, self.second, self.transition, self.emission)

    def _prior(self, **options: Any) -> Rows:
        """The concentrations of the priors."""
        steps = map_rows(lambda table: torch.full_like(table, self.transition_concentration, **options), self._tables())
        return steps._replace(emission=torch.full_like(self.emission, self.emission_concentration, **options))

    def _set(self, rows: Rows) -> None:
        map_rows(lambda parameter, table: parameter.data.copy_(table), self._tables(), rows)

    def _read(self, batch: Batch) -> tuple[Tensor | None, Tensor, Tensor]:
        """Symbols (None if missing), tags (-1 where not known; 0 at padding, as the symbols) and lengths."""
        symbols, tags, mask = symbols_of(batch.get("inputs")), batch.get("tags"), batch.get("mask")
        shaped = next((x for x in (mask, symbols, tags) if x is not None), None)
        if shaped is None:
            raise ValueError(f"batch has no inputs, tags or mask: its keys are {sorted(batch)}")
        if mask is None:
            mask = torch.ones(shaped.shape, dtype=torch.bool, device=shaped.device)
        tags = torch.full(mask.shape, -1, device=mask.device) if tags is None else tags
        for name, ids, low, high in (("tags", tags, -1, self.num_tags), ("symbols", symbols, 0, self.num_symbols)):
            if ids is not None:
                check_ids(name, ids, low, high, mask)
        return (
            None if symbols is None else torch.where(mask, symbols, 0),
            torch.where(mask, tags, 0),
            lengths_from_mask(mask),
        )

    def _sequences(self, data: Any) -> list[tuple[Tensor, Tensor]]:
        """Symbols and tags ``[T]`` of each sequence of a Dataset; -1 where a tag is not known."""
        sequences = []
        for index in range(len(data)):
            example = data[index]
            symbols = symbols_of(example.get("inputs"))
            if symbols is None:
                raise ValueError(f"data[{index}] has no inputs: its keys are {sorted(example)}")
            tags = example["tags"] if "tags" in example else torch.full_like(symbols, -1)
            real = example["mask"] if "mask" in example else torch.ones_like(symbols, dtype=torch.bool)
            if not symbols.shape == tags.shape == real.shape:
                raise ValueError(
                    f"data[{index}]: inputs {list(symbols.shape)} and tags {list(tags.shape)} differ in shape"
                )
            sequences.append((symbols[real].cpu(), tags[real].cpu()))
        for name, ids, low, high in (("symbols", 0, 0, self.num_symbols), ("tags", 1, -1, self.num_tags)):
            flat = torch.cat([sequence[ids] for sequence in sequences])
            check_ids(name, flat, low, high, torch.ones_like(flat, dtype=torch.bool))
        return sequences


def symbols_of(inputs: Any) -> Tensor | None:
    """The symbols among the inputs.

    Raises:
        ValueError: for a dict without any.
    """
    if isinstance(inputs, Mapping):
        if "symbols" not in inputs:
            raise ValueError(f"inputs has no 'symbols', which an HMMTagger takes: its keys are {sorted(inputs)}")
        inputs = inputs["symbols"]
    symbols: Tensor | None = inputs
    return symbols


def check_ids(name: str, ids: Tensor, low: int, high: int, mask: Tensor) -> None:
    """ValueError unless ids have the shape of the mask and lie, where it is True, from ``low`` to ``high - 1``."""
    if ids.shape != mask.shape:
        raise ValueError(f"{name} must have the shape of the mask, {list(mask.shape)}, got {list(ids.shape)}")
    wrong = ids[mask & ((ids < low) | (ids >= high))]
    if len(wrong):
        raise ValueError(f"{name} must lie from {low} to {high - 1}, got {int(wrong[0])}")
