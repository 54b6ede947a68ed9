"""An exported model has what it needs of the user's folder, or says at export what it lacks."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model, load_model
from trainers.modeling.build import build_network
from trainers.modeling.optimizer import build_optimizer
from trainers.spec import RunSpec, resolve

WORKLOAD = '''
"""A workload of several modules that reads files."""
import torch
from torch import nn

from trainers import Spec, Workload, table
from layers.heads import Head
import helpers
{imports}

class Mine(Workload):
    class Model(Spec):
        path: str = ""
        paths: dict[str, list[str]] = {{}}

    def dataset(self):
        raise NotImplementedError

    def build(self):
        {build}
        return nn.Sequential(nn.Linear(3, 4), helpers.Scale(), Head(4))

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, output, batch):
        return output.sum(1)

    def example(self):
        return torch.ones(1, 3)
'''

FILES = {
    "helpers.py": "from torch import nn\nfrom deeper import FACTOR\n"
    "class Scale(nn.Module):\n    def forward(self, x):\n        return x * FACTOR\n",
    "deeper.py": "FACTOR = 1.5\n",
    "unrelated.py": "raise RuntimeError\n",
    "layers/__init__.py": "",
    "layers/heads.py": "from torch import nn\nfrom .sizes import OUT\nfrom . import extra\n"
    "def Head(width):\n    return nn.Linear(width, OUT)\n",
    "layers/sizes.py": "OUT = 2\n",
    "layers/extra/__init__.py": "",
    "layers/unused.py": "",
    "layers/words.txt": "one two",
}

OWN = ("mine", "helpers", "deeper", "layers", "lazy", "reader")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The working folder of a user with several modules, which are unloaded afterwards."""
    folder = tmp_path / "user"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in OWN:
            del sys.modules[name]
    importlib.invalidate_caches()


def exported(
    folder: Path, to: Path, build: str = "pass", imports: str = "", **model: Any
) -> tuple[list[str], list[Any]]:
    """Export a model of `mine:Mine`; the lines that it says, and its output for ones."""
    (folder / "mine.py").write_text(WORKLOAD.format(build=build, imports=imports))
    spec, workload = resolve({"workload": "mine:Mine", "model": model}, RunSpec)
    network = build_network(spec.train, workload)
    checkpoints = Checkpoints(folder.parent / "checkpoints")
    checkpoints.save(1, network, build_optimizer(spec.optimizer, network))
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    notes = export_model(to, spec, workload, latest)
    return notes, network(torch.ones(1, 3)).tolist()


def assert_loads(folder: Path, build: str = "pass", imports: str = "", **model: Any) -> Path:
    """Assert that an export says nothing, and can be loaded when the user's folder is gone."""
    to, elsewhere, gone = (folder.with_name(name) for name in ("exported", "elsewhere", "gone"))
    before = (Path.cwd(), list(sys.path), sys.modules.get("helpers"))
    notes, wanted = exported(folder, to, build, imports, **model)
    assert notes == []
    assert (Path.cwd(), sys.path) == before[:2]
    forget()
    elsewhere.mkdir()
    folder.rename(gone)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.setattr(sys, "path", [path for path in sys.path if path != str(folder)])
        patch.syspath_prepend(str(elsewhere))
        before = (Path.cwd(), list(sys.path), None)
        assert load_model(to)(torch.ones(1, 3)).tolist() == wanted
        assert (Path.cwd(), sys.path, sys.modules.get("helpers")) == before
    gone.rename(folder)
    return to


def test_all_modules_that_it_imports_are_with_it(folder: Path) -> None:
    to = assert_loads(folder)
    names = {str(path.relative_to(to / "code")) for path in (to / "code").rglob("*.*")}
    assert names == {
        *("mine.py", "helpers.py", "deeper.py", "layers/__init__.py", "layers/heads.py"),
        *("layers/sizes.py", "layers/extra/__init__.py", "layers/words.txt"),
    }


def test_modules_that_are_imported_late_or_by_name_are_with_it(folder: Path) -> None:
    (folder / "lazy.py").write_text("VALUE = 2\n")
    (folder / "reader.py").write_text("VALUE = 3\n")
    imports = "import importlib"
    assert_loads(folder, "import lazy; importlib.import_module('rea' + 'der')", imports)


READS = {
    "relative": "open('table.npy', 'rb').read()",
    "beside the module": "(__import__('pathlib').Path(__file__).parent / 'table.npy').read_bytes()",
    "in a folder": "open('tables/table.npy', 'rb').read()",
    "within a package": "open('layers/words.txt').read()",
    "all of a folder": "[open(f'tables/{n}') for n in __import__('os').listdir('tables')]",
    "by a library": "__import__('numpy').load('table.npy')",
    "safetensors": "__import__('safetensors').safe_open('weights.safetensors', 'pt').keys()",
    "relative, named by the spec": "open(self.model.path, 'rb').read()",
}


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *((how, "build") for how in READS),
        *((how, "import") for how, line in READS.items() if "self" not in line),
    ],
)
def test_files_that_building_reads_are_with_it(folder: Path, how: str, when: str) -> None:
    (folder / "tables").mkdir()
    for place in (folder, folder / "tables"):
        np.save(place / "table.npy", np.arange(3))
    save_file({"x": torch.ones(2)}, folder / "weights.safetensors")
    (folder / "other.csv").write_text("of the data set alone")
    line = {"build" if when == "build" else "imports": READS[how]}
    to = assert_loads(folder, **line, path="table.npy")
    assert not (to / "code" / "other.csv").exists()


def test_files_that_the_spec_names_by_their_whole_path_are_with_it(folder: Path) -> None:
    (folder / "vocabulary.txt").write_text("a b c")
    path = str(folder / "vocabulary.txt")
    build = "open(self.model.path).read(); open(self.model.paths['all'][0]).read()"
    to = assert_loads(folder, build, path=path, paths={"all": [path]})
    assert (to / "code" / "vocabulary.txt").read_text() == "a b c"


def test_a_file_at_a_fixed_place_is_named(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "fixed.txt"
    place.write_text("text")
    notes, _ = exported(folder, tmp_path / "exported", f"open({str(place)!r}).read()")
    assert notes == [f"the exported model needs {place} wherever it is loaded"]
    load_model(tmp_path / "exported")


def test_a_pickle_is_not_taken_along_and_named(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / "pretrained.pt")
    notes, _ = exported(folder, tmp_path / "exported", "torch.load('pretrained.pt')")
    [note] = notes
    assert note.startswith(
        "the exported model cannot be loaded in another folder: FileNotFoundError: "
    )
    assert "pretrained.pt" in note
    load_model(tmp_path / "exported")  # here it can


def test_a_pickle_in_a_package_does_not_spoil_the_model(folder: Path) -> None:
    torch.save({}, folder / "layers" / "old.pt")
    assert_loads(folder)


def test_an_example_that_the_network_cannot_take_costs_no_model(
    folder: Path, tmp_path: Path
) -> None:
    text = WORKLOAD.format(build="pass", imports="").replace("ones(1, 3)", "ones(1, 7)")
    (folder / "mine.py").write_text(text)
    spec, workload = resolve({"workload": "mine:Mine"}, RunSpec)
    network = build_network(spec.train, workload)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, network, build_optimizer(spec.optimizer, network))
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    [note] = export_model(tmp_path / "exported", spec, workload, latest)
    assert note.startswith("the exported model has no signature: the network cannot take example")
    assert load_model(tmp_path / "exported")(torch.ones(1, 3)).equal(network(torch.ones(1, 3)))


def test_a_model_that_is_another_one_at_each_load_is_named(folder: Path, tmp_path: Path) -> None:
    """Numbers of a generator that no seed reaches are neither saved nor built again."""
    (folder / "deeper.py").write_text(
        "import numpy as np, torch\nFACTOR = torch.from_numpy(np.random.default_rng().random(2))\n"
    )
    text = "def __init__(self):\n        super().__init__()\n        self.factor = FACTOR\n"
    source = (folder / "helpers.py").read_text()
    source = source.replace("def forward", f"{text}    def forward").replace("x * FACTOR", "x")
    (folder / "helpers.py").write_text(source)
    notes, _ = exported(folder, tmp_path / "exported")
    assert notes == [
        "the exported model is another one each time it is loaded: 1.factor is not in the "
        "state_dict, and not from the run's seed; register it as a buffer"
    ]
