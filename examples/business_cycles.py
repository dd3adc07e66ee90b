"""When was the United States in recession, judged by two series of numbers?

Quarterly growth of real GDP and change of the unemployment rate, 1959 to 2009, are cut into two regimes by a hidden
Markov model (Hamilton 1989) and by a hidden semi-Markov one, whose regimes say how long they last. Neither sees a date
of the National Bureau of Economic Research, against which both are drawn and judged. Ends in a table and a picture.

    python examples/business_cycles.py [--small]
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from statsmodels.datasets import macrodata

from probllm.data import Dataset
from probllm.models import HMM, HSMM, GaussianEmissions
from probllm.models.hsmm import mean_durations

small = "--small" in sys.argv
table = macrodata.load_pandas().data
growth, change = 100 * np.diff(np.log(table["realgdp"])), np.diff(table["unemp"])
quarter = (table["year"] + (table["quarter"] - 1) / 4).to_numpy()[1:]
x = torch.tensor(np.stack([growth, change], -1), dtype=torch.float32)
data, batch = Dataset([{"inputs": x}]), {"inputs": x[None]}

# quarters from a peak (not counted) to its trough: nber.org, "US business cycle expansions and contractions"
RECESSIONS = [(1960.25, 1961.0), (1969.75, 1970.75), (1973.75, 1975.0), (1980.0, 1980.5), (1981.5, 1982.75),
              (1990.5, 1991.0), (2001.0, 2001.75), (2007.75, 2009.25)]  # fmt: skip
official = np.any([(quarter > peak) & (quarter <= trough) for peak, trough in RECESSIONS], axis=0)

MODELS = {
    "hidden Markov": HMM(GaussianEmissions(2, 2)),
    "hidden semi-Markov": HSMM(GaussianEmissions(2, 2), max_duration=45, duration_concentration=0.1),
}
shown = Table("model", "quarters that agree", "mean recession, quarters", "log likelihood")
figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharex=True, layout="constrained")
axes[0].plot(quarter, growth, label="growth of real GDP, %", color="#0072B2")
axes[0].plot(quarter, change, label="change of unemployment, points", color="#D55E00")
axes[0].legend(loc="upper right", ncols=2, frameon=False)
for axis, (name, model) in zip(axes[1:], MODELS.items(), strict=True):
    model.estimate(data, restarts=2 if small else 10)
    recession = int(model.emissions.mean[:, 0].argmin())  # the regime in which output grows less
    model.permute(torch.tensor([1 - recession, recession]))
    probability = model.marginals(batch)[0, :, 1].detach().numpy()
    found = model.predict(batch)[0].numpy() == 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], found, [0]]))))[::2]
    log_likelihood = model.log_prob(batch).sum().item()
    shown.add_row(name, f"{(found == official).mean():.1%}", f"{runs.mean():.1f}", f"{log_likelihood:.1f}")
    axis.plot(quarter, probability, color="black", lw=1)
    axis.set(ylabel=f"{name}\nP(recession)", ylim=(-0.03, 1.03))
for axis in axes:
    for peak, trough in RECESSIONS:
        axis.axvspan(peak + 0.25, trough + 0.25, color="#BBBBBB", alpha=0.6, lw=0)
axes[0].set_title("Shaded: recessions as the NBER dates them", loc="left", fontsize=10)
figure.savefig("business_cycles.svg")
Console().print(shown)
model = MODELS["hidden semi-Markov"]
print("mean durations of the semi-Markov model, quarters:", [round(x, 1) for x in mean_durations(model).tolist()])
