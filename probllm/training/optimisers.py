"""Optimisers over the parameters of one or several models: each parameter once, decay where it belongs.

Weight decay is left off biases, norms (whatever has fewer than two dimensions) and torch's embeddings, whose rare rows
it would shrink between two sights of a word; the tables of our encoders, which it regularises, decay. Parameters with
sparse gradients (``nn.Embedding(sparse=True)``) go to SparseAdam where the optimiser for the others is AdamW or Muon,
which take no sparse gradient; Adagrad and SGD take both.

Muon (Jordan et al., 2024) moves a hidden matrix along the orthogonal matrix nearest to its momentum, and AdamW trains
the rest. Its steps are scaled to the size of AdamW's (Liu et al., 2025), so that one learning rate serves both.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from probllm.training.processes import is_sharded, sharded_as, whole
from probllm.training.roles import embeddings, hidden_matrices, sparse_tables

OptimiserName: TypeAlias = Literal["adamw", "muon", "adagrad", "sgd"]
OptimiserFactory: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
NAMES = get_args(OptimiserName)


class Optimisers:
    """The torch optimisers that train one group of parameters.

    Args:
        entries: parameters, or dicts of torch's kind (``{"params": [...], "lr": ..., "weight_decay": ...}``).
        modules: the models they belong to, which tell what an embedding is and what has a name.
        optimiser: ``"adamw"``, ``"muon"``, ``"adagrad"``, ``"sgd"`` (momentum 0.9), or a function from torch's
            parameter groups to an optimiser, which then gets the dense parameters.
        learning_rate, weight_decay: where an entry has none of its own.
    Raises:
        ValueError: if there is nothing to train.
        RuntimeError: for Muon, if this torch has none.
    """

    def __init__(
        self,
        entries: Iterable[Any],
        modules: Mapping[str, nn.Module],
        optimiser: OptimiserName | OptimiserFactory,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        tables, sparse = embeddings(modules.values()), sparse_tables(modules.values())
        hidden = hidden_matrices(modules.values()) - sparse if optimiser == "muon" else set()
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.parameters: list[nn.Parameter] = []
        seen: set[int] = set()
        for entry in entries:
            options = dict(entry) if isinstance(entry, Mapping) else {"params": [entry]}
            for parameter in options.pop("params"):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                self.parameters.append(parameter)
                is_sparse = id(parameter) in sparse
                kind = "sparse" if is_sparse else "hidden" if id(parameter) in hidden else "dense"
                bare = parameter.ndim < 2 or id(parameter) in tables or is_sparse
                decay = 0.0 if is_sparse else options.get("weight_decay", 0.0 if bare else weight_decay)
                rate = options.get("lr", learning_rate)
                extra = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
                group = groups.setdefault(
                    # torch computes with shards and with whole parameters, but not with both at once
                    (kind, rate, decay, is_sharded(parameter), *map(repr, extra.items())),
                    {"params": [], "lr": rate, "weight_decay": decay, **extra},
                )
                group["params"].append(parameter)
        if not self.parameters:
            raise ValueError("model has no parameter with requires_grad=True: there is nothing to train")
        self.optimisers = _build(groups, optimiser)
        self._own = callable(optimiser)
        self._dense_only = set() if optimiser in ("adagrad", "sgd") else seen - sparse
        self._modules = modules
        self._names = {
            id(parameter): f"{prefix}.{name}" if prefix else name
            for prefix, module in reversed(list(modules.items()))
            for name, parameter in module.named_parameters()
        }
        self._rates = [[group["lr"] for group in one.param_groups] for one in self.optimisers]

    def set_rate(self, factor: float) -> None:
        """Multiply every group's own learning rate by the factor."""
        for one, rates in zip(self.optimisers, self._rates, strict=True):
            for group, rate in zip(one.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def step(self) -> None:
        """Move the parameters along their gradients."""
        for one in self.optimisers:
            one.step()

    def clip(self, limit: float | None) -> float:
        """Scale the gradients down to a norm of ``limit`` where they exceed it; the norm that they had."""
        values: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                if id(parameter) in self._dense_only:
                    raise ValueError(
                        f"the gradient of {name_of(parameter, self._modules)} is sparse, which its optimiser does not "
                        "take: set sparse=True on the layer that holds it, or train with optimiser='adagrad'"
                    )
                parameter.grad = parameter.grad.coalesce()
                values.append(parameter.grad._values())
            else:
                values.append(parameter.grad)
        kinds = [[value for value in values if is_sharded(value) == sharded] for sharded in (False, True)]
        norm = math.hypot(*(float(whole(nn.utils.get_total_norm(some))) for some in kinds if some))
        if limit is not None and norm > limit:
            for value in values:
                value.mul_(limit / norm)
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimisers' state: tensors by name (``embedding.weight/exp_avg``), and JSON values by name."""
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for one in self.optimisers:
            for parameter, state in one.state.items():
                for key, value in state.items():
                    place = tensors if isinstance(value, Tensor) else scalars
                    place[f"{self._names[id(parameter)]}/{key}"] = value
        if self._own:  # some optimisers count their steps in their groups
            scalars["groups/"] = [
                {
                    "names": [self._names[id(parameter)] for parameter in group["params"]],
                    "values": {
                        key: value for key, value in group.items() if isinstance(value, (bool, int, float, str))
                    },
                }
                for one in self.optimisers
                for group in one.param_groups
            ]
        return tensors, scalars

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take back what ``state`` gave.

        Raises:
            ValueError: for a tensor that is not of its parameter's shape.
        """
        states: dict[str, dict[str, Any]] = {}
        parameters = {self._names[id(parameter)]: parameter for parameter in self.parameters}
        for name, value in (*tensors.items(), *scalars.items()):
            owner, _, key = name.rpartition("/")
            if owner in parameters and isinstance(value, Tensor) and value.ndim:
                shape = parameters[owner].shape
                if value.shape == shape:
                    value = sharded_as(value, parameters[owner])
                elif not self._own:
                    raise ValueError(f"the optimiser's {name} has shape {list(value.shape)}, expected {list(shape)}")
            states.setdefault(owner, {})[key] = value
        saved = {name: each["values"] for each in scalars.get("groups/", []) for name in each["names"]}
        for one in self.optimisers:
            own = one.state_dict()
            names = [[self._names[id(parameter)] for parameter in group["params"]] for group in one.param_groups]
            state = {
                index: states[name]
                for group, some in zip(own["param_groups"], names, strict=True)
                for index, name in zip(group["params"], some, strict=True)
                if name in states
            }
            groups = [
                {**group, **saved.get(some[0], {})} for group, some in zip(own["param_groups"], names, strict=True)
            ]
            one.load_state_dict({"state": state, "param_groups": groups})


def name_of(parameter: Tensor, modules: Mapping[str, nn.Module]) -> str:
    """What a parameter is called in the first of the modules that holds it."""
    for prefix, module in modules.items():
        for name, own in module.named_parameters():
            if own is parameter:
                return f"{prefix}.{name}" if prefix else name
    return "a parameter without a name"


def _build(
    groups: Mapping[tuple[Any, ...], dict[str, Any]], optimiser: OptimiserName | OptimiserFactory
) -> list[torch.optim.Optimizer]:
    kinds: dict[str, list[dict[str, Any]]] = {"hidden": [], "dense": [], "sparse": []}
    for (kind, *_), group in groups.items():
        kinds[kind].append(group)
    hidden, dense, sparse = kinds.values()
    if optimiser == "adagrad":
        return [torch.optim.Adagrad([*dense, *sparse])]
    if optimiser == "sgd":
        # Momentum would make a sparse gradient's buffer dense.
        return [torch.optim.SGD([*({"momentum": 0.9, **group} for group in dense), *sparse])]
    built: list[torch.optim.Optimizer] = []
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(
                f"optimiser is 'muon', which torch has from 2.9 on, but this is torch {torch.__version__}"
            )
        built.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"))
    if dense:
        if callable(optimiser):
            built.append(optimiser(dense))
        elif optimiser in ("adamw", "muon"):
            plain = all(p.dtype in (torch.float32, torch.float64, torch.bfloat16) for g in dense for p in g["params"])
            built.append(torch.optim.AdamW(dense, fused=plain))
        else:
            raise ValueError(f"optimiser is {optimiser!r}, expected {', '.join(map(repr, NAMES))} or a function")
    if sparse:
        for group in sparse:
            group.pop("weight_decay")
        built.append(torch.optim.SparseAdam(sparse))
    return built
