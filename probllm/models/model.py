"""The base of all models: a Pyro program that owns its weights, beside the same verbs in bare tensors.

``forward(batch)`` is the generative story, ``guide(batch)`` the approximation where there are latent variables. With
N = ``data_size`` (the size of the batch B where it is None) the plate scales the batch by N / B, and

    loss(batch) = -(1 / N) * trace(model).log_prob_sum() = -(1 / B) * sum_b log p(targets_b | inputs_b) - log prior / N

so that Pyro's ``Trace_ELBO`` loss is N times ours where nothing local is latent (else both estimate the same bound).

**Weights.** Pyro keeps parameters in one store for the process, by name, and a root ``PyroModule`` without a name meets
its twin there: two models of one class then train one set of weights between them. Here every root model bears a name
of its own (``CRFTagger_3``); copies and unpickled models get new names; what the store holds under the name of a model
but the model no longer does is dropped before each run; a model that dies takes its entries along; and tensors put in
place of the weights by ``torch.func.functional_call`` never reach the store.
"""

import functools
import itertools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from probllm.models.weights import read_weights, write_atomically, write_weights
from probllm.nn.config import Configurable, from_config, to_config

Batch: TypeAlias = dict[str, Any]  # tensors, or dicts of tensors, with the batch dimension in front

CONFIG_FILE = "config.json"
_numbers = itertools.count(1)


class Model(Configurable, PyroModule):  # type: ignore[misc]
    """A model: subclass it, make the constructor's arguments JSON values or Configurables, and write ``forward``.

    A subclass gives ``forward`` and either ``log_prob`` (where it is exact; ``loss`` follows) or ``loss``. Every verb
    that it does not have raises ``NotImplementedError``.

    Attributes:
        data_size: how many sequences (pictures, ...) there are in all, which scales the plate; None: those of the
            batch. ``fit`` sets it where it is None.
    """

    data_size: int | None

    def __init__(self) -> None:
        super().__init__()
        self.data_size = None
        self._take_new_name()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "guide" in cls.__dict__:
            cls.guide = _with_effects(cls.__dict__["guide"])  # type: ignore[method-assign]

    # The Pyro program.

    def forward(self, batch: Batch) -> Any:
        """The generative story: a target that is in the batch is observed, one that is missing is sampled."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(batch)")

    def guide(self, batch: Batch) -> Any:
        """The approximate posterior of the latent variables; empty where there are none."""

    def plate(self, batch: Batch) -> Any:
        """``pyro.plate`` over the batch, scaled by ``data_size / B``."""
        size = batch_size(batch)
        # The indices are given, for Pyro would else draw a permutation of the whole data at each step.
        return pyro.plate("data", self.data_size or size, subsample=torch.arange(size))

    # The verbs, in bare tensors.

    def loss(self, batch: Batch) -> Tensor:
        """What training minimises: the mean over the batch of ``-log_prob``, a scalar, in nats per sequence."""
        return -self.log_prob(batch).mean()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named losses; several are summed, or alternate where ``parameter_groups`` has a group for each of them."""
        return {"loss": self.loss(batch)}

    def parameter_groups(self) -> dict[str, list[Any]]:
        """Parameters by the name of the loss that trains them; an entry is a parameter or an optimiser's dict.

        Such a dict is torch's: ``{"params": [...], "lr": 0.01, "weight_decay": 0.0}``.
        """
        return {"loss": list(self.parameters())}

    def log_prob(self, batch: Batch) -> Tensor:
        """Log probability of the targets given the inputs, ``[B]``, in nats; only where it is exact."""
        raise NotImplementedError(f"{type(self).__name__} has no exact log_prob")

    def predict(self, batch: Batch) -> Tensor:
        """The best guess of the target; 0 where the batch is padding."""
        raise NotImplementedError(f"{type(self).__name__} has no predict")

    def sample(self, n: int, batch: Batch | None = None) -> Tensor:
        """``n`` samples of the target, ``n`` leading."""
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def estimate(self, data: Any) -> list[dict[str, float]]:
        """Set the weights in closed form or by EM; ``fit`` calls it first.

        Args:
            data: ``len(data)``, ``data[i]`` and ``data.batches(...)``, as of ``probllm.data.Dataset``.
        Returns:
            one dict of numbers an iteration (``{"loss": ...}``), for the history of the run; may be empty.
        Raises:
            NotImplementedError: where there is none, and the model is trained by gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed-form or EM estimate")

    # Weights on disk.

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder: ``config.json`` and the weights that it names, as safetensors.

        A save that is cut off leaves the model that was there before.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = to_config(self)
        weights = write_weights(self.state_dict(), folder, "weights")
        text = json.dumps({"model": config, "data_size": self.data_size, "weights": weights.name}, indent=2)
        write_atomically(folder / CONFIG_FILE, text.encode())
        for old in folder.glob("weights-*.safetensors"):
            if old != weights:
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path, allow: Iterable[type[Configurable]] = ()) -> Self:
        """Read what ``save`` wrote: an equal model, on the CPU, in evaluation mode. Nothing is unpickled.

        Args:
            folder: where the model was saved.
            allow: classes outside ``probllm`` which the config may name, as those of a user's encoder.
        Raises:
            FileNotFoundError: if there is no model in the folder.
            ValueError: if what lies there is malformed, or is not a ``cls``.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"folder {str(folder)!r} holds no saved model: {CONFIG_FILE} is missing")
        try:
            saved = json.loads(path.read_text())
            config, data_size, weights = saved["model"], saved["data_size"], saved["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the config of a saved model: {error!r}") from error
        if Path(weights).name != weights:
            raise ValueError(f"{path}: weights is {weights!r}, expected the name of a file beside it")
        # The fresh weights are overwritten, so that drawing them must not move the random numbers on.
        with torch.random.fork_rng(devices=[]):
            model = from_config(config, allow=[*allow, *([cls] if cls is not Model else [])])
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, expected a {cls.__name__}")
        read_weights(model, Path(folder) / weights)
        model.data_size = data_size
        model.eval()
        return model

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every module, but a module that is held twice is named once.

        ``torch.func.functional_call`` asks for duplicates, and would put the weights of such a module back wrongly.
        """
        if remove_duplicate or not recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        for name, module in self.named_modules(prefix=prefix):
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    yield (f"{name}.{key}" if name else key), parameter

    # Two models never share a weight unless they hold the same module.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._effects():
            return super().__call__(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._take_new_name()

    def __copy__(self) -> Self:
        # A shallow copy holds the same modules, and so keeps the name.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def _take_new_name(self) -> None:
        name = f"{type(self).__name__}_{next(_numbers)}"
        _rename(self, name, type(self._pyro_context)())
        weakref.finalize(self, _forget, name).atexit = False

    @contextmanager
    def _effects(self) -> Iterator[None]:
        """Parameters as Pyro's ``param`` sites, as in ``forward``, with the store in step with the module."""
        context, name = self._pyro_context, self._pyro_name
        if context.active:  # within a run of this model, or of one that holds it
            with context:
                yield
            return
        parameters = list(self.parameters())
        for key, module in self.named_modules():
            # Pyro does not reach those within a plain nn.ModuleList.
            if isinstance(module, PyroModule) and not module._pyro_name:
                module._pyro_set_supermodule(f"{name}.{key}", context)
        if all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in parameters):
            _forget(name, unless=parameters)
            with context:
                yield
        else:  # functional_call has put other tensors in place of the weights
            with pyro.settings.context(module_local_params=True):
                context.param_state = {"params": {}, "constraints": {}}
                with context:
                    yield


def batch_size(batch: Batch) -> int:
    """The number of sequences (pictures, ...) in a batch: the leading dimension of its first tensor."""
    for value in batch.values():
        if isinstance(value, dict):
            return batch_size(value)
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"batch holds no tensor with a batch dimension; its keys are {sorted(batch)}")


def _with_effects(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Model, *args: Any, **kwargs: Any) -> Any:
        with self._effects():
            return method(self, *args, **kwargs)

    return run


def _rename(module: Any, name: str, context: Any) -> None:
    module._pyro_name, module._pyro_context = name, context
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}", context)


def _forget(name: str, unless: Iterable[Tensor] = ()) -> None:
    """Drop what Pyro's store holds under the name of a model, ``unless`` it is one of these tensors."""
    store, kept = pyro.get_param_store(), {id(parameter) for parameter in unless}
    for key in [key for key in store.keys() if key.startswith(f"{name}.")]:  # noqa: SIM118
        if id(store._params[key]) not in kept:
            value = store._params.pop(key)
            store._constraints.pop(key, None)
            if store._param_to_name.get(value) == key:
                del store._param_to_name[value]
