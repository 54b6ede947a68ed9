"""The surfaces of `benchmarks/search.py`: their minima, and curves between those of the grid."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "search_surfaces.py"
HARTMANN_MINIMUM = (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573)
"""From https://www.sfu.ca/~ssurjano/hart6.html."""


@pytest.fixture(scope="module")
def surfaces() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_surfaces", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_surfaces"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("branin", {"x": -np.pi, "y": 12.275}),
        ("branin", {"x": np.pi, "y": 2.275}),
        ("hartmann6", {f"x{i}": x for i, x in enumerate(HARTMANN_MINIMUM)}),
        ("ackley5", {f"x{i}": x for i, x in enumerate((3, -7, 11, -2, 5))}),
        ("rosenbrock4", {f"x{i}": 1.0 for i in range(4)}),
        ("mixed", {"rule": "lion", "shape": "gelu", "rate": 10**-4.3, "depth": 9, "decay": 0.3}),
    ],
)
def test_the_lowest_value_is_where_it_is_known_to_be(
    surfaces: ModuleType, name: str, values: dict[str, Any]
) -> None:
    surface = surfaces.known_surfaces()[name]
    (value,), seconds = surface.curve(values)
    assert value == pytest.approx(surface.minimum, abs=1e-5)
    assert seconds == 1.0
    assert set(values) == set(surface.space)


def test_a_curve_between_those_of_the_grid(surfaces: ModuleType) -> None:
    """The same at the points of the grid, and straight between them in the logarithms."""
    grid = {"rate": [0.01, 0.1, 1.0], "decay": [1.0, 10.0], "dropout": [0.0, 0.5], "width": [2, 4]}
    places = np.arange(3.0)[:, None, None, None], np.arange(2.0)[None, :, None, None]
    losses = (places[0] + 10 * places[1] + 0 * np.zeros((3, 2, 2, 2)))[..., None] + [0.0, 0.5]
    seconds = np.array([1.0, 3.0])

    def log_losses(**values: float) -> list[float]:
        curve, each_s = surfaces._interpolated(losses, seconds, grid, values)
        assert each_s == {2: 1.0, 4: 3.0}[int(values["width"])]
        return list(np.log(curve))

    at_a_point = log_losses(rate=0.1, decay=10.0, dropout=0.5, width=4)
    assert at_a_point == pytest.approx([11.0, 11.5])
    between = log_losses(rate=10**-1.5, decay=10**0.25, dropout=0.1, width=2)
    assert between == pytest.approx([3.0, 3.5])
    assert log_losses(rate=1.0, decay=1.0, dropout=0.0, width=2) == pytest.approx([2.0, 2.5])
