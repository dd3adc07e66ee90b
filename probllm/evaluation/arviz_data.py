"""Posterior draws as what ArviZ reads, behind one function for both of its lines.

ArviZ 0.x takes one keyword a group and gives an ``InferenceData``; ArviZ 1.x takes one dictionary of groups and gives
an xarray ``DataTree``. Both hold each variable as ``[chain, draw, ...]``, and ``result.posterior[name]`` or
``result["posterior"][name]`` reads it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def to_arviz(
    posterior: Mapping[str, npt.ArrayLike],
    *,
    log_likelihood: Mapping[str, npt.ArrayLike] | None = None,
    posterior_predictive: Mapping[str, npt.ArrayLike] | None = None,
    observed_data: Mapping[str, npt.ArrayLike] | None = None,
) -> Any:
    """Turn draws into ArviZ's object, whichever ArviZ is installed.

    Args:
        posterior: draws by parameter name, each ``[chain, draw, ...]``; tensors are welcome.
        log_likelihood: log probabilities of the observations, ``[chain, draw, ...]``, in nats.
        posterior_predictive: draws of new observations, ``[chain, draw, ...]``.
        observed_data: the observations, without chain and draw.
    Returns:
        an ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with one group an argument.
    Raises:
        ValueError: if there is no variable, or a variable lacks the two leading dimensions or disagrees about them.
    """
    import arviz

    groups: dict[str, dict[str, npt.NDArray[Any]]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    drawn = {"posterior": posterior, "log_likelihood": log_likelihood, "posterior_predictive": posterior_predictive}
    for group, variables in drawn.items():
        if variables is None:
            continue
        groups[group] = {name: _array(value) for name, value in variables.items()}
        for name, array in groups[group].items():
            if array.ndim < 2:
                raise ValueError(f"{group}[{name!r}] must be [chain, draw, ...]; its shape is {array.shape}")
            sizes[f"{group}[{name!r}]"] = array.shape[:2]
    if not groups.get("posterior"):
        raise ValueError("posterior must hold at least one variable; it is empty")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all draws must have the same chains and draws; they have {sizes}")
    if observed_data is not None:
        groups["observed_data"] = {name: _array(value) for name, value in observed_data.items()}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


def _array(value: Any) -> npt.NDArray[Any]:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
