"""The surfaces of benchmarks/search.py: five functions whose minimum is known, and two real ones.

A real surface is a table of learning curves. All configurations of a grid are trained once, as
many at a time as have the same shapes, and the curves are kept in this user's cache folder. A
configuration between those of the grid has a curve between theirs: the logarithm of the loss is
interpolated in each parameter, in the logarithm of those that are searched so.

| surface | what it is |
|---|---|
| `branin` | 2 parameters, three minima of the same value |
| `hartmann6` | 6 parameters, six minima of different values |
| `ackley5` | 5 parameters, hundreds of minima around the one in the middle |
| `rosenbrock4` | 4 parameters, a narrow bent valley |
| `mixed` | 2 choices, an integer, 2 real parameters; the best rate depends on the others |
| `digits-mlp` | scikit-learn's digits, 2 layers: rate, weight decay, dropout, width; 27 epochs |
| `small-gpt` | bytes of Python's standard library, 1 layer: rate, decay, dropout, width; 27 times |
"""

import ast
import hashlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional as F

from cluster.base.files import cache_folder

EVALUATIONS = 27
"""Evaluations of a trial on a real surface, after equal numbers of steps."""

Values = Mapping[str, Any]
Space = dict[str, dict[str, Any]]
"""Name of a parameter -> its distribution, as in the section `sweep` of a spec."""


@dataclass(frozen=True)
class Surface:
    """What is searched: where, and the losses that a trial with these values reports."""

    space: Space
    curve: Callable[[Values], tuple[list[float], float]]
    """The loss at each evaluation, and the seconds from one evaluation to the next."""
    minimum: float
    """The lowest loss that there is; of a real surface the lowest of the grid."""
    trials: int
    """How many trials, if all are trained to the end, have the cost of a search."""


def branin(v: Values) -> float:
    x, y = v["x"], v["y"]
    valley = y - 5.1 / (4 * np.pi**2) * x**2 + 5 / np.pi * x - 6
    return float(valley**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(x) + 10)


HARTMANN_WEIGHTS = np.array([1.0, 1.2, 3.0, 3.2])
HARTMANN_SCALES = np.array(
    [
        [10, 3, 17, 3.5, 1.7, 8],
        [0.05, 10, 17, 0.1, 8, 14],
        [3, 3.5, 1.7, 10, 17, 8],
        [17, 8, 0.05, 10, 0.1, 14],
    ]
)
HARTMANN_CENTRES = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann6(v: Values) -> float:
    x = np.array([v[f"x{i}"] for i in range(6)])
    distance = (HARTMANN_SCALES * (x - HARTMANN_CENTRES) ** 2).sum(axis=1)
    return float(-(HARTMANN_WEIGHTS * np.exp(-distance)).sum())


def ackley5(v: Values) -> float:
    """With its minimum beside the middle of the space, which some searches try first."""
    x = np.array([v[f"x{i}"] for i in range(5)]) - np.array([3.0, -7.0, 11.0, -2.0, 5.0])
    wide = -20 * np.exp(-0.2 * np.sqrt((x**2).mean()))
    return float(wide - np.exp(np.cos(2 * np.pi * x).mean()) + 20 + np.e)


def rosenbrock4(v: Values) -> float:
    x = np.array([v[f"x{i}"] for i in range(4)])
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def mixed(v: Values) -> float:
    """Like a model's: a rate whose best value depends on the rule, a depth, a decay."""
    best_rate = {"sgd": -1.0, "adam": -3.0, "lion": -4.0}[v["rule"]]
    floor = {"sgd": 0.3, "adam": 0.1, "lion": 0.0}[v["rule"]]
    shape = {"relu": 0.2, "gelu": 0.0, "tanh": 0.4, "silu": 0.05}[v["shape"]]
    rate = (np.log10(v["rate"]) - best_rate + 0.1 * (v["depth"] - 6)) ** 2
    return float(
        floor + shape + 0.5 * rate + 0.02 * (v["depth"] - 9) ** 2 + (v["decay"] - 0.3) ** 2
    )


def _at_once(function: Callable[[Values], float], values: Values) -> tuple[list[float], float]:
    return [function(values)], 1.0


def _uniform(names: list[str], low: float, high: float) -> Space:
    return {name: {"uniform": [low, high]} for name in names}


def known_surfaces() -> dict[str, Surface]:
    def known(
        function: Callable[[Values], float], space: Space, minimum: float, trials: int
    ) -> Any:
        return Surface(space, partial(_at_once, function), minimum, trials)

    coordinates = [f"x{i}" for i in range(6)]
    return {
        "branin": known(
            branin, {"x": {"uniform": [-5, 10]}, "y": {"uniform": [0, 15]}}, 0.397887, 50
        ),
        "hartmann6": known(hartmann6, _uniform(coordinates, 0, 1), -3.322368, 80),
        "ackley5": known(ackley5, _uniform(coordinates[:5], -20, 30), 0.0, 80),
        "rosenbrock4": known(rosenbrock4, _uniform(coordinates[:4], -2, 2), 0.0, 80),
        "mixed": known(
            mixed,
            {
                "rule": {"choice": ["sgd", "adam", "lion"]},
                "shape": {"choice": ["relu", "gelu", "tanh", "silu"]},
                "rate": {"loguniform": [1e-6, 1.0]},
                "depth": {"integer": [2, 16]},
                "decay": {"uniform": [0.0, 1.0]},
            },
            0.0,
            80,
        ),
    }


class Mlp(nn.Module):
    """Two layers; `drop` is the share of units that are left out, a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, drop: Tensor) -> Tensor:
        for layer in self.layers:
            x = _dropout(F.relu(layer(x)), drop)
        return self.head(x)


class Gpt(nn.Module):
    """One layer of causal attention on `context` tokens."""

    def __init__(self, width: int, tokens: int, context: int = 24) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor, drop: Tensor) -> Tensor:
        length = ids.shape[-1]
        x = self.token(ids) + self.place.weight[:length]
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = x + _dropout(self.out(scores.masked_fill(later, -1e9).softmax(-1) @ v), drop)
        x = x + _dropout(self.down(F.gelu(self.up(self.norms[1](x)))), drop)
        return self.head(self.norms[2](x))


def _dropout(x: Tensor, drop: Tensor) -> Tensor:
    return x * (torch.rand_like(x) >= drop) / (1 - drop) if torch.is_grad_enabled() else x


@dataclass(frozen=True)
class Task:
    """Real training: data, and a model for each width."""

    build: Callable[[int], nn.Module]
    train: tuple[Tensor, Tensor]
    """Inputs and targets."""
    val: tuple[Tensor, Tensor]
    batch: int
    steps_per_evaluation: int
    grid: dict[str, list[float]]
    """The values of `rate`, `decay`, `dropout` and `width` that are trained."""


def digits_mlp() -> Task:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    grid = {
        "rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "decay": [1e-4, 1e-2, 1.0],
        "dropout": [0.0, 0.25, 0.5],
        "width": [8, 32, 128],
    }
    return Task(Mlp, (x[:1257], y[:1257]), (x[1257:], y[1257:]), 64, 20, grid)


def small_gpt() -> Task:
    folder = Path(ast.__file__).parent
    files = ("argparse", "ast", "tarfile", "textwrap", "inspect", "typing", "pickle", "shutil")
    texts = [(folder / f"{name}.py").read_bytes() for name in files]
    number = {byte: i for i, byte in enumerate(sorted(set(b"".join(texts))))}
    windows = [
        torch.tensor([number[byte] for byte in text[: len(text) // 25 * 25]]).view(-1, 25)
        for text in (b"".join(texts[:-1]), texts[-1])
    ]
    train, val = ((each[:, :-1], each[:, 1:]) for each in (windows[0], windows[1][::20]))
    grid = {
        "rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "decay": [1e-3, 1.0],
        "dropout": [0.0, 0.15, 0.3],
        "width": [16, 32],
    }
    return Task(lambda width: Gpt(width, len(number)), train, val, 8, 10, grid)


def _train_together(
    task: Task, width: int, rates: Tensor, decays: Tensor, drops: Tensor, evaluations: int
) -> tuple[np.ndarray, float]:
    """AdamW with a cosine schedule, one model for each rate: losses [K, evaluations], seconds.

    The seconds are those of one model between two evaluations.
    """
    torch.manual_seed(0)
    model = task.build(width)
    one, _ = stack_module_state([model])
    weights = {name: each.detach().repeat_interleave(len(rates), 0) for name, each in one.items()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    steps = evaluations * task.steps_per_evaluation
    inputs, targets = task.train

    def loss(own: dict[str, Tensor], drop: Tensor, x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(model, own, (x, drop))
        return F.cross_entropy(output.flatten(0, -2), y.flatten())

    step_all = vmap(grad_and_value(loss), (0, 0, None, None), randomness="different")
    curves, begin_s = [], time.process_time()
    for step in range(steps):
        chosen = torch.randint(len(inputs), (task.batch,))
        grads, _ = step_all(weights, drops, inputs[chosen], targets[chosen])
        factor = 0.5 * (1 + np.cos(np.pi * step / steps))
        with torch.no_grad():
            for name, g in grads.items():
                shape = (-1, *[1] * (g.ndim - 1))
                m, v = moments[name]
                m.lerp_(g, 0.1), v.lerp_(g * g, 0.01)
                update = (m / (1 - 0.9 ** (step + 1))) / (
                    (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
                )
                rate = factor * rates.view(shape)
                weights[name] -= rate * (update + decays.view(shape) * weights[name])
        if (step + 1) % task.steps_per_evaluation == 0:
            with torch.no_grad():
                curves.append(vmap(loss, (0, 0, None, None))(weights, drops, *task.val))
    seconds = (time.process_time() - begin_s) / evaluations / len(rates)
    losses = torch.stack(curves, dim=1).nan_to_num(nan=1e3).clamp(1e-4, 1e3)
    return losses.double().numpy(), seconds


def _table(name: str, task: Task, evaluations: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the losses [rate, decay, dropout, width, evaluations]; seconds [width]."""
    key = repr((task.grid, task.batch, task.steps_per_evaluation, evaluations, torch.__version__))
    code = "".join(map(inspect.getsource, (Mlp, Gpt, _dropout, _train_together))).encode()
    digest = hashlib.sha256(key.encode() + code + task.train[0].numpy().tobytes()).hexdigest()[:16]
    file = cache_folder() / "benchmarks" / f"{name}-{digest}.npz"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        three = [task.grid[each] for each in ("rate", "decay", "dropout")]
        rates, decays, drops = torch.tensor([*itertools.product(*three)]).T
        shape = tuple(len(each) for each in three)
        made = []
        for width in task.grid["width"]:
            print(f"{name}: {len(rates)} models of width {width}", flush=True)
            made.append(_train_together(task, int(width), rates, decays, drops, evaluations))
        losses = np.stack([each.reshape(*shape, -1) for each, _ in made], axis=3)
        part = file.with_suffix(".part.npz")
        np.savez(part, losses=np.log(losses), seconds=[seconds for _, seconds in made])
        part.rename(file)
    with np.load(file) as found:
        return found["losses"], found["seconds"]


def _interpolated(
    losses: np.ndarray, seconds: np.ndarray, grid: dict[str, list[float]], values: Values
) -> tuple[list[float], float]:
    width = grid["width"].index(values["width"])
    curve = losses[:, :, :, width]
    for name in ("rate", "decay", "dropout"):  # each takes the first axis away
        points, value = np.array(grid[name]), values[name]
        if name != "dropout":
            points, value = np.log(points), np.log(value)
        place = int(np.clip(np.searchsorted(points, value) - 1, 0, len(points) - 2))
        share = (value - points[place]) / (points[place + 1] - points[place])
        curve = (1 - share) * curve[place] + share * curve[place + 1]
    return [float(each) for each in np.exp(curve)], float(seconds[width])


REAL: dict[str, Callable[[], Task]] = {"digits-mlp": digits_mlp, "small-gpt": small_gpt}


def real_surfaces(names: Iterable[str], tiny: bool) -> dict[str, Surface]:
    """Train the tables that are not in the cache; minutes of one core the first time."""
    found = {}
    for name in names:
        task = REAL[name]()
        losses, seconds = _table(name, task, 3 if tiny else EVALUATIONS)
        grid = task.grid
        space: Space = {
            "rate": {"loguniform": [grid["rate"][0], grid["rate"][-1]]},
            "decay": {"loguniform": [grid["decay"][0], grid["decay"][-1]]},
            "dropout": {"uniform": [grid["dropout"][0], grid["dropout"][-1]]},
            "width": {"choice": grid["width"]},
        }
        curve = partial(_interpolated, losses, seconds, grid)
        found[name] = Surface(space, curve, float(np.exp(losses.min())), 16)
    return found
