"""The sources of `language`, its tokens and its network."""

import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.base.config import validate
from cluster.base.errors import DataError, SpecError
from trainers.data.dataset import dataset_name, prepare_dataset
from trainers.data.splits import open_splits
from trainers.devices import Cpu
from trainers.engine.evaluate import evaluate
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.modeling.forward import Forward
from trainers.spec import RunSpec, find_spec, resolve
from trainers.worker import Worker
from trainers.workloads.language import text, tokenizer
from trainers.workloads.language.workload import Language
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.spaces.space import SweepRunSpec, check_parameters, trial_spec_data

POEM = "Füllest wieder Busch und Tal\nStill mit Nebelglanz,\nLösest endlich auch einmal\n"


def language(model: dict[str, Any] | None = None, **data: Any) -> Language:
    return Language(validate(Language.Data, data), validate(Language.Model, model or {}))


def texts_of(workload: Language) -> dict[str, bytes]:
    """The text of each split's windows, in their order, with the first token."""
    found = {}
    for split, rows in workload.dataset().items():
        width = (-1, workload.data.context + 1)
        tokens = np.frombuffer(b"".join(rows["tokens"].to_pylist()), np.uint8).reshape(width)
        found[split] = tokens[:1, 0].tobytes() + tokens[:, 1:].tobytes()
    return found


def documents(count: int = 60) -> list[str]:
    return [f"{number}: {POEM}" for number in range(count)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    lines = [json.dumps({"id": index, key: text}) for index, text in enumerate(texts)]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    return path


def write_files(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for index, each in enumerate(texts):
        (path / f"{index:03d}.txt").write_text(each)
    (path / ".DS_Store").write_bytes(b"\xff\xfe")
    return path


FORMATS: dict[str, Callable[[Path, list[str]], Path]] = {
    "texts.jsonl": write_jsonl,
    "texts.parquet": write_parquet,
    "texts": write_files,
}


class TestSources:
    @pytest.mark.parametrize("small", [False, True], ids=["one part", "many parts"])
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_document_is_in_one_split_completely(
        self, tmp_path: Path, name: str, small: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With windows of one token, so that only the first token of a part is lost."""
        source = FORMATS[name](tmp_path / name, [*documents(), "", *documents(20)])
        if small:
            monkeypatch.setattr(text, "PART_BYTES", 300)
        workload = language(source=str(source), val_fraction=0.2, test_fraction=0.2)
        parts = workload.parts()
        assert (len(parts) > 5) == small
        split_of: dict[bytes, str] = {}
        found: list[bytes] = []
        for part in parts:
            for split, document in workload.documents(part):
                assert split_of.setdefault(document, split) == split  # copies stay together
                found.append(document)
        assert found == [each.encode() for each in (*documents(), *documents(20))]
        assert {"train", "val", "test"} == set(split_of.values())

    def test_windows_contain_the_text_of_the_documents(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "own.jsonl", documents(), key="body")
        workload = language(source=str(source), field="body", context=16)
        assert len(workload.parts()) == 1
        split = list(workload.documents(workload.parts()[0]))
        for name, said in texts_of(workload).items():
            whole = b"".join(each + b"\0" for of, each in split if of == name)
            assert whole.startswith(said)
            assert len(whole) - len(said) < 16

    def test_a_single_plain_file_is_cut_into_splits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "book.txt"
        lines = [f"line {number} of a book\n" for number in range(500)]
        source.write_text("".join(lines))
        monkeypatch.setattr(text, "PART_BYTES", 2000)
        workload = language(source=str(source), val_fraction=0.1, test_fraction=0.2)
        assert len(workload.parts()) > 3
        found = [pair for part in workload.parts() for pair in workload.documents(part)]
        assert b"".join(said for _, said in found).decode() == "".join(lines)
        order = [split for split, _ in found]
        assert order == sorted(order, key=["train", "val", "test"].index)
        sizes = {name: sum(len(t) for s, t in found if s == name) for name in set(order)}
        total = source.stat().st_size
        assert sizes["test"] == pytest.approx(0.2 * total, abs=30)
        assert sizes["val"] == pytest.approx(0.1 * total, abs=30)

    def test_own_splits_are_kept_and_a_missing_val_is_cut_from_train(self, tmp_path: Path) -> None:
        write_files(tmp_path / "train", documents())
        (tmp_path / "test").mkdir()
        write_jsonl(tmp_path / "test" / "some.jsonl", ["t" * 40] * 4)
        found = texts_of(language(source=str(tmp_path), context=8, val_fraction=0.2))
        assert set(found) == {"train", "val", "test"}
        assert set(found["test"]) == set(b"t\0")
        assert b"t" * 40 not in found["train"] + found["val"]
        write_files(tmp_path / "val", ["v" * 40] * 4)
        found = texts_of(language(source=str(tmp_path), context=8))
        assert set(found["val"]) == set(b"v\0")

    def test_the_standard_library(self) -> None:
        """Its source without its tests; the split does not depend on the other fields."""
        (part, *_) = language().parts()
        paths = [Path(span.path) for span in part.spans]
        library = Path(json.__file__).parents[1]
        assert all(path.is_relative_to(library) and path.suffix == ".py" for path in paths)
        assert not any("test" in path.parts or "site-packages" in path.parts for path in paths)
        assert language().made_with() == {"python": sys.version.split()[0]}


BROKEN: list[tuple[str, Callable[[Path], Any] | None, str]] = [
    ("nowhere.txt", None, "{path}: no such file or folder"),
    (
        "bad.txt",
        lambda path: path.write_bytes(b"good\n" * 9 + b"caf\xe9\n"),
        "{path}: line 10: is not UTF-8 (invalid continuation byte)",
    ),
    (
        "bad.jsonl",
        lambda path: path.write_text('{"text": "a"}\n\n{"text": "b"\n'),
        "{path}: line 3: is not JSON: Expecting ',' delimiter",
    ),
    (
        "other.jsonl",
        lambda path: path.write_text('{"text": "a"}\n{"body": "b"}\n'),
        "{path}: line 2: has no text under 'text' (data.field)",
    ),
    (
        "bad.parquet",
        lambda path: path.write_bytes(b"PAR1 is how it begins"),
        "{path}: is not readable as Parquet: ",
    ),
    (
        "other.parquet",
        lambda path: pq.write_table(pa.table({"body": ["a"]}), path),
        "{path}: no column 'text' (data.field; has: body)",
    ),
    (
        "null.parquet",
        lambda path: pq.write_table(pa.table({"text": ["a", "b", None]}), path, row_group_size=2),
        "{path}: row 2: text holds no text",
    ),
]


@pytest.mark.parametrize(("name", "write", "line"), BROKEN, ids=[case[0] for case in BROKEN])
def test_a_malformed_file_is_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], Any] | None, line: str
) -> None:
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(DataError) as caught:
        language(source=str(path)).dataset()
    message = str(caught.value)
    assert message.startswith(line.format(path=path))
    assert "\n" not in message


def test_an_error_in_a_later_part_names_the_line_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "abc"}\n' * 100 + "{\n" + '{"text": "abc"}\n' * 10)
    monkeypatch.setattr(text, "PART_BYTES", 100)
    with pytest.raises(DataError, match="line 101: is not JSON"):
        language(source=str(path)).dataset()


class TestBytePairs:
    def test_decoding_returns_the_text_and_its_bytes(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer

        odd = f"{tokenizer.SEPARATOR} is in the text\t\r\n  \x00 \U0001f600 {POEM}"
        source = write_jsonl(tmp_path / "own.jsonl", [*documents(), odd])
        workload = language(source=str(source), vocabulary=300, context=8)
        (part,) = workload.parts()
        common = workload.common([part])
        assert common == workload.common([part])
        merged = Tokenizer.from_str(common["tokenizer.json"].decode())
        assert merged.get_vocab_size() == 300
        tokens, length = tokenizer.encode_byte_pairs([odd.encode()], common["tokenizer.json"])
        assert tokens.dtype == np.int16
        assert merged.decode(tokens[:-1].tolist(), skip_special_tokens=False) == odd
        assert length.sum() == len(odd.encode()) + 1
        rows = workload.part(part, common)["train"]
        size = rows["bytes"].to_numpy()
        assert size.min() >= 8  # of a window of 8 tokens
        assert size.mean() > 8.5

    def test_a_missing_library_is_reported_with_its_extra(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(name: str) -> str:
            raise text.PackageNotFoundError(name)

        monkeypatch.setattr(text, "version", absent)
        with pytest.raises(SpecError) as caught:
            dataset_name(language(vocabulary=1000), Path())
        assert str(caught.value) == (
            "data.vocabulary: more than 256 needs the package tokenizers, which is not installed "
            "(pip install 'heliostat[language]')"
        )
        assert dataset_name(language(), Path())


def small(**sections: Any) -> tuple[RunSpec, Language]:
    data = {
        "workload": "language",
        "data": {"context": 12},
        "model": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1},
        "train": {"global_batch": 8, "precision": "fp64", "steps": 4},
        "optimizer": {"lr": 0.01},
        "tracking": {"every_steps": 1},
        **sections,
    }
    spec, workload = resolve(data, RunSpec)
    assert isinstance(workload, Language)
    return spec, workload


def windows(count: int = 40, context: int = 12) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (count, context + 1), generator=random, dtype=torch.uint8)
    tokens[:, 1::2] = tokens[:, :-1:2] // 2
    return {"tokens": tokens, "bytes": torch.full((count,), context, dtype=torch.int32)}


class TestNetwork:
    def test_the_first_loss_is_eight_bits_per_byte(self) -> None:
        spec, workload = small()
        network = build_network(spec.train, workload)
        found = evaluate(spec, workload, Forward(workload, network), windows(), Worker())
        assert found == {
            "loss": pytest.approx(math.log(256)),
            "perplexity": pytest.approx(256),
            "bits_per_byte": pytest.approx(8),
        }

    def test_bits_per_byte_are_of_all_bytes_together(self) -> None:
        """Not the mean of the windows' values."""
        _, workload = small()
        means = {"loss": 2 * math.log(2), "bytes": 24.0}
        assert workload.summary(means)["bits_per_byte"] == pytest.approx(2 * 12 / 24)

    def test_attention_is_causal_and_depends_on_positions(self) -> None:
        spec, workload = small(model={"layers": 1, "width": 16, "heads": 2})
        network = build_network(spec.train, workload).eval()
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
            tokens = windows(1)["tokens"][:, :12].long()
            before = network(tokens)
            assert before.shape == (1, 12, 256)
            changed = tokens.clone()
            changed[0, 7] += 1
            after = network(changed)
            assert torch.equal(before[:, :7], after[:, :7])
            assert not torch.isclose(before[0, 7:], after[0, 7:]).all(1).any()
            swapped = tokens.clone()
            swapped[0, [2, 3]] = tokens[0, [3, 2]]
            assert tokens[0, 2] != tokens[0, 3]
            assert not torch.allclose(network(swapped)[0, 11], before[0, 11])

    def test_fused_trials_learn_as_single_ones(self) -> None:
        samples, variants, alone = windows(), [], []
        for lr in (0.01, 0.02):
            spec, workload = small(optimizer={"lr": lr})
            variants.append(Variant(spec, workload, 4))
            stepper = TrainStep(spec, workload, samples, Worker(), 4)
            alone.append([stepper.run(step).item() for step in range(4)])
        program = Program(variants[0], 2, samples, Cpu())
        for slot, variant in enumerate(variants):
            network = build_network(variant.spec.train, variant.workload)
            assert program.fits(variant, network)
            program.load_trial(slot, variant, network)
        together = np.array(program.run([0, 1], 4))
        assert together.T.tolist() == [pytest.approx(losses, rel=1e-9) for losses in alone]


HALVES_SOURCE = '''
"""One of two workers that hold half of the heads each."""

import torch
import torch.distributed as dist

from trainers.worker import Worker
from trainers.spec import RunSpec, resolve
from trainers.engine.step import TrainStep


def work(rank, meeting, data, samples, answers):
    torch.set_num_threads(1)
    place = f"file://{meeting}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    spec, workload = resolve(data, RunSpec)
    samples = {name: torch.from_numpy(values) for name, values in samples.items()}
    stepper = TrainStep(spec, workload, samples, Worker(rank, 2, local_world_size=2), 4)
    answers.put((rank, stepper.strategy.mode, [stepper.run(step).item() for step in range(4)]))
    dist.destroy_process_group()
'''


@pytest.mark.slow
def test_heads_can_be_split_over_workers(modules: Path, tmp_path: Path) -> None:
    spec, workload = small()
    stepper = TrainStep(spec, workload, windows(), Worker(), 4)
    alone = [stepper.run(step).item() for step in range(4)]

    (modules / "halves.py").write_text(HALVES_SOURCE)
    import halves

    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    data = {**spec.model_dump(), "scale": {"workers": 2, "parallel": "tensor", "group": 2}}
    samples = {name: values.numpy() for name, values in windows().items()}
    workers = [
        context.Process(
            target=halves.work, args=(rank, tmp_path / "meeting", data, samples, answers)
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    found = sorted(answers.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    assert [mode for _, mode, _ in found] == ["tensor", "tensor"]
    assert found[0][2] == pytest.approx(alone, rel=1e-9)


@pytest.mark.slow
def test_training_beats_byte_frequencies(tmp_path: Path) -> None:
    """After a few seconds on real source code: less than 85 % of the entropy of single bytes."""
    source = tmp_path / "source"
    source.mkdir()
    for path in sorted(Path(json.__file__).parents[1].glob("asyncio/*.py")):
        (source / path.name).write_bytes(path.read_bytes())
    spec, workload = small(
        data={"source": str(source), "vocabulary": 512, "context": 64, "val_fraction": 0.2},
        model={"layers": 2, "width": 64, "heads": 2},
        optimizer={"lr": 0.01, "betas": [0.9, 0.95]},
        train={"global_batch": 16, "steps": 120},
    )
    splits = open_splits(prepare_dataset(workload, tmp_path))
    stepper = TrainStep(spec, workload, splits["train"], Worker(), 120)
    for step in range(120):
        stepper.run(step)
    found = evaluate(spec, workload, stepper.forward, splits["val"], Worker())
    (part,) = workload.parts()
    said = b"".join(each for split, each in workload.documents(part) if split == "val")
    share = np.bincount(np.frombuffer(said, np.uint8)) / len(said)
    by_itself = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert found["bits_per_byte"] < 0.85 * by_itself


def test_the_shipped_spec_trains_and_sweeps_this_workload() -> None:
    data = find_spec("language")[1]
    spec, workload = resolve(data, SweepRunSpec)
    assert isinstance(workload, Language)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    _, trial = resolve(trial_spec_data(data, {"optimizer.lr": 0.1}), RunSpec)
    assert trial.tokens_per_sample == 128
