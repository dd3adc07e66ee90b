"""Hypothesis profiles, one thread for torch's tiny products, and where the real corpora lie."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
from pathlib import Path

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

# a suite started in the background of a shell inherits that Ctrl-C is ignored; tests of Ctrl-C need it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=400, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _same_seed_and_empty_param_store():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real corpora; a test that asks for it is skipped where the corpora are missing."""
    folder = Path(os.environ.get("PROBLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real corpora: set PROBLLM_DATA or put them at ../shared/data")
    return folder
