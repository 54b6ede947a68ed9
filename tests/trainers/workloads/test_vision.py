"""The sources of `vision`, from real files, and its network."""

import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import nn

from cluster.base.config import validate
from cluster.base.errors import DataError, SpecError
from trainers.counter_rng import SampleRandom
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import SampleStream
from trainers.data.splits import open_split
from trainers.spec import RunSpec, find_spec, resolve
from trainers.workload import Batch
from trainers.workloads.vision.workload import Vision

Split = dict[str, npt.NDArray[Any]]


def vision(model: dict[str, Any] | None = None, **data: Any) -> Vision:
    return Vision(validate(Vision.Data, data), validate(Vision.Model, model or {}))


def splits_of(workload: Vision) -> dict[str, Split]:
    """The workload's splits as numpy arrays."""
    shape = (-1, workload.data.channels, workload.data.size, workload.data.size)
    return {
        name: {
            "image": np.frombuffer(b"".join(rows["image"].to_pylist()), np.uint8).reshape(shape),
            "label": rows["label"].to_numpy(),
        }
        for name, rows in workload.dataset().items()
    }


def sizes(splits: Mapping[str, Any]) -> dict[str, int]:
    """Samples of each split."""
    return {name: len(samples) for name, samples in splits.items()}


def contents(split: Split) -> set[tuple[bytes, int]]:
    pairs = zip(split["image"], split["label"], strict=True)
    return {(image.tobytes(), int(label)) for image, label in pairs}


def picture(seed: int, mode: str = "RGB", side: int = 12) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, classes: int = 2, each: int = 20, first_seed: int = 0) -> Path:
    """One folder per class, half of its images PNG and half JPEG."""
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(each):
            name = f"{index:03d}.png" if index % 2 else f"{index:03d}.JPG"
            seed = first_seed + label * each + index
            picture(seed).save(folder / f"class{label}" / name)
    return folder


def error_of(workload: Vision) -> str:
    """The one-line error of the workload's data set."""
    with pytest.raises(DataError) as caught:
        workload.dataset()
    message = str(caught.value)
    assert "\n" not in message
    return message


def digits_batch(count: int = 4) -> Batch:
    rows = splits_of(vision())["train"]
    return {name: torch.from_numpy(values[:count].copy()) for name, values in rows.items()}


def trained_a_little(workload: Vision, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose residual branches are no longer zero."""
    torch.manual_seed(0)
    model = workload.build().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


class TestSpec:
    def test_unknown_keys_are_refused_with_a_hint(self) -> None:
        with pytest.raises(SpecError, match="unknown key; did you mean 'source'"):
            vision(sorce="digits")
        with pytest.raises(SpecError, match="unknown key; did you mean 'width'"):
            vision({"widht": 8})

    @pytest.mark.parametrize(
        ("section", "field", "value"),
        [
            ("data", "channels", 2),
            ("data", "classes", 1),
            ("data", "val_fraction", 0.0),
            ("data", "test_fraction", 0.95),
            ("model", "blocks", []),
            ("model", "blocks", [1, 0]),
            ("model", "dropout", 1.0),
            ("model", "label_smoothing", -0.1),
            ("model", "augment", -1.0),
        ],
    )
    def test_values_out_of_range_are_refused(self, section: str, field: str, value: object) -> None:
        with pytest.raises(SpecError):
            validate(Vision.Data if section == "data" else Vision.Model, {field: value})

    def test_a_relative_source_becomes_absolute_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        data = validate(Vision.Data, {"source": "pictures"})
        monkeypatch.chdir("/")
        assert data.source == str(tmp_path / "pictures")
        assert validate(Vision.Data, data.model_dump()) == data
        assert validate(Vision.Data, {}).source == "digits"

    def test_the_shipped_spec_is_valid_and_names_this_workload(self) -> None:
        _, workload = resolve(find_spec("digits")[1], RunSpec)
        assert isinstance(workload, Vision)
        assert workload.data.source == "digits"


class TestDigits:
    def test_real_pixels_scaled_to_bytes(self) -> None:
        splits = splits_of(vision())
        assert {name: len(split["label"]) for name, split in splits.items()} == {
            "train": 1258,
            "val": 180,
            "test": 359,
        }
        levels = np.unique(np.concatenate([split["image"] for split in splits.values()]))
        assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]

    def test_splits_are_disjoint_and_stratified(self) -> None:
        splits = splits_of(vision())
        train, val, test = (contents(splits[name]) for name in ("train", "val", "test"))
        assert not train & val
        assert not train & test
        assert not val & test
        for name, share in (("val", 0.1), ("test", 0.2)):
            counts = np.bincount(splits[name]["label"], minlength=10)
            everywhere = sum(np.bincount(split["label"], minlength=10) for split in splits.values())
            assert np.all(np.abs(counts - share * everywhere) < 1)

    def test_the_split_is_fixed_and_does_not_depend_on_size_or_channels(self) -> None:
        plain, large = splits_of(vision()), splits_of(vision(size=16, channels=3))
        for name in plain:
            assert plain[name]["label"].tolist() == large[name]["label"].tolist()
            assert large[name]["image"].shape[1:] == (3, 16, 16)
            # Enlarged and grey: three equal channels, the brightness kept.
            assert np.all(large[name]["image"] == large[name]["image"][:, :1])
            bright = plain[name]["image"].mean((1, 2, 3))
            assert np.abs(large[name]["image"].mean((1, 2, 3)) - bright).max() < 8
        assert plain["test"]["label"][:12].tolist() == [6, 2, 7, 6, 6, 1, 7, 9, 4, 1, 3, 8]

    def test_no_test_split_on_request(self) -> None:
        assert set(vision(test_fraction=0.0).dataset()) == {"train", "val"}

    def test_a_wrong_number_of_classes_is_refused(self) -> None:
        assert error_of(vision(classes=7)) == "digits: has 10 classes, data.classes is 7"

    def test_the_baselines_of_the_docstring(self) -> None:
        splits = splits_of(vision())
        pixels = {name: split["image"].reshape(-1, 64) / 255 * 16 for name, split in splits.items()}
        for baseline in (KNeighborsClassifier(3), SVC(gamma=0.001)):
            baseline.fit(pixels["train"], splits["train"]["label"])
            right = baseline.score(pixels["test"], splits["test"]["label"])
            assert right == pytest.approx(355 / 359, abs=1.5 / 359)


class TestFolder:
    def test_sorted_class_folders_are_the_labels(self, tmp_path: Path) -> None:
        for name, grey in (("b", 200), ("a", 10), ("c", 90)):
            (tmp_path / name).mkdir()
            for index in range(8):  # different files, so that none is a copy
                image = Image.new("L", (30 + index, 20), grey)
                image.save(tmp_path / name / f"{index}.png")
        splits = splits_of(vision(source=str(tmp_path), classes=3, size=4))
        for split in splits.values():
            assert split["image"].shape[1:] == (1, 4, 4)
            for image, label in zip(split["image"], split["label"], strict=True):
                assert np.all(image == (10, 200, 90)[label])

    def test_png_and_jpeg_in_colour(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        splits = splits_of(vision(source=str(tmp_path), classes=2, channels=3, size=12))
        assert sum(len(split["label"]) for split in splits.values()) == 40
        wanted = np.asarray(picture(1)).transpose(2, 0, 1).tobytes()  # PNG keeps every bit
        everything = set.union(*(contents(split) for split in splits.values()))
        assert (wanted, 0) in everything

    def test_the_split_does_not_depend_on_names_or_order(self, tmp_path: Path) -> None:
        original = write_images(tmp_path / "original")
        renamed = tmp_path / "renamed"
        for folder in original.iterdir():
            (renamed / folder.name / "deeper").mkdir(parents=True)
            for index, file in enumerate(sorted(folder.iterdir(), reverse=True)):
                shutil.copy(file, renamed / folder.name / "deeper" / f"{index}{file.suffix}")
        ours = vision(source=str(original), classes=2).dataset()
        theirs = vision(source=str(renamed), classes=2).dataset()
        assert set(ours) == {"train", "val", "test"}
        assert all(ours[name].equals(theirs[name]) for name in ours)

    def test_copies_of_an_image_stay_together(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        for file in list(tmp_path.rglob("*.*")):
            for copy in range(4):
                shutil.copy(file, file.with_stem(f"{file.stem}-{copy}"))
        splits = splits_of(vision(source=str(tmp_path), classes=2, size=12, channels=3))
        assert sum(len(split["label"]) for split in splits.values()) == 200
        assert not contents(splits["train"]) & contents(splits["test"])
        assert not contents(splits["train"]) & contents(splits["val"])

    def test_own_splits_are_kept_and_a_missing_val_is_cut_from_train(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train")
        write_images(tmp_path / "test", each=3, first_seed=1000)
        found = vision(source=str(tmp_path), classes=2).dataset()
        assert sizes(found) == {"train": 36, "val": 4, "test": 6}
        write_images(tmp_path / "val", each=5, first_seed=2000)
        found = vision(source=str(tmp_path), classes=2).dataset()
        assert sizes(found) == {"train": 40, "val": 10, "test": 6}

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        (tmp_path / "class1").rename(tmp_path / "train")
        assert set(vision(source=str(tmp_path), classes=2).dataset()) == {"train", "val", "test"}

    def test_stray_files_are_ignored(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        before = vision(source=str(tmp_path), classes=2).dataset()
        for name in (".DS_Store", "Thumbs.db", "._001.png", "labels.csv", "notes"):
            (tmp_path / "class0" / name).write_bytes(b"no image")
            (tmp_path / name).write_bytes(b"no image")
        for name in (".git", ".ipynb_checkpoints"):
            (tmp_path / name).mkdir()
            (tmp_path / "class0" / name).mkdir()
            (tmp_path / "class0" / name / "copy.png").write_bytes(encoded(1))
        after = vision(source=str(tmp_path), classes=2).dataset()
        assert all(before[name].equals(after[name]) for name in before)

    def test_a_photo_is_read_upright(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        half = Image.new("L", (8, 8))
        half.paste(255, (0, 0, 4, 8))  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its left side
        half.save(tmp_path / "class0" / "photo.png", exif=exif)
        everything = set.union(
            *(contents(s) for s in splits_of(vision(source=str(tmp_path), classes=2)).values())
        )
        upright = np.zeros((8, 8), np.uint8)
        upright[:4] = 255
        assert (upright.tobytes(), 0) in everything


class TestFolderErrors:
    def test_missing_source(self, tmp_path: Path) -> None:
        path = tmp_path / "nowhere"
        assert error_of(vision(source=str(path))) == f"{path}: no such file or folder"

    def test_number_of_class_folders(self, tmp_path: Path) -> None:
        write_images(tmp_path, classes=3, each=1)
        wanted = f"{tmp_path}: has 3 class folders, data.classes is 10"
        assert error_of(vision(source=str(tmp_path))) == wanted

    def test_class_folder_without_images(self, tmp_path: Path) -> None:
        write_images(tmp_path, each=2)
        (tmp_path / "class2").mkdir()
        (tmp_path / "class2" / "readme.txt").touch()
        message = error_of(vision(source=str(tmp_path), classes=3))
        assert message.startswith(f"{tmp_path / 'class2'}: ")

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    @pytest.mark.parametrize("kept", [0.0, 0.5])
    def test_truncated_image(self, tmp_path: Path, kind: str, kept: float) -> None:
        write_images(tmp_path, each=2)
        bad = tmp_path / "class1" / f"bad.{kind.lower()}"
        whole = encoded(7, kind)
        bad.write_bytes(whole[: int(kept * len(whole))])
        assert error_of(vision(source=str(tmp_path), classes=2)).startswith(f"{bad}: ")

    def test_text_in_a_png_file(self, tmp_path: Path) -> None:
        write_images(tmp_path, each=2)
        bad = tmp_path / "class0" / "bad.png"
        bad.write_text("first line\nsecond line\n")
        assert error_of(vision(source=str(tmp_path), classes=2)).startswith(
            f"{bad}: is not an image"
        )

    def test_sixteen_bits_are_refused_rather_than_clipped(self, tmp_path: Path) -> None:
        write_images(tmp_path, each=2)
        deep = tmp_path / "class0" / "deep.png"
        Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(deep)
        message = error_of(vision(source=str(tmp_path), classes=2))
        assert message.startswith(f"{deep}: ")
        assert "8 bits" in message

    def test_unknown_split_folder(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", each=2)
        write_images(tmp_path / "valid", each=2)
        message = error_of(vision(source=str(tmp_path), classes=2))
        assert message.startswith(f"{tmp_path / 'valid'}: ")

    def test_classes_that_differ_between_splits(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", each=2)
        write_images(tmp_path / "val", each=2)
        (tmp_path / "val" / "class1").rename(tmp_path / "val" / "other")
        message = error_of(vision(source=str(tmp_path), classes=2))
        assert message.startswith(f"{tmp_path / 'val'}: ")


class TestParquet:
    @pytest.mark.parametrize("nested", [False, True], ids=["bytes", "hugging-face"])
    def test_yields_the_same_data_as_the_folder(self, tmp_path: Path, nested: bool) -> None:
        folder = write_images(tmp_path / "folder")
        files = sorted(folder.rglob("*.*"))
        images = [file.read_bytes() for file in files]
        labels = [int(file.parent.name[-1]) for file in files]
        column = [{"bytes": i, "path": None} for i in images] if nested else images
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"image": column, "label": labels}), file)
        from_folder = vision(source=str(folder), classes=2).dataset()
        from_file = vision(source=str(file), classes=2).dataset()
        assert all(from_folder[name].equals(from_file[name]) for name in from_folder)

    def test_a_folder_of_files_is_one_pool(self, tmp_path: Path) -> None:
        images = [encoded(seed) for seed in range(40)]
        rows = pa.table({"image": images, "label": [seed % 2 for seed in range(40)]})
        pq.write_table(rows, tmp_path / "whole.parquet")
        whole = vision(source=str(tmp_path), classes=2).dataset()
        pq.write_table(rows.slice(25), tmp_path / "a.parquet")
        pq.write_table(rows.slice(0, 25), tmp_path / "b.parquet")
        (tmp_path / "whole.parquet").unlink()
        parts = vision(source=str(tmp_path), classes=2).dataset()
        assert all(whole[name].equals(parts[name]) for name in whole)

    @pytest.mark.parametrize(
        ("rows", "wanted"),
        [
            ({"label": [0, 1]}, ": no column 'image' (has: label)"),
            ({"image": [b"", b""]}, ": no column 'label' (has: image)"),
            ({"image": [b"", b""], "label": ["cat", "dog"]}, ": label is string, not an integer"),
            ({"image": [1, 2], "label": [0, 1]}, ": row 0: image holds no encoded bytes"),
            (
                {"image": [{"bytes": None, "path": "a.png"}], "label": [0]},
                ": row 0: image holds no encoded bytes",
            ),
        ],
    )
    def test_columns_of_another_shape(
        self, tmp_path: Path, rows: dict[str, list[Any]], wanted: str
    ) -> None:
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.table(rows), file)
        assert error_of(vision(source=str(file), classes=2)) == f"{file}{wanted}"

    @pytest.mark.parametrize("label", [12, -1, None])
    def test_label_out_of_range(self, tmp_path: Path, label: int | None) -> None:
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"image": [encoded(0)] * 3, "label": [3, 9, label]}), file)
        wanted = f"{file}: row 2: label {label} is out of range for data.classes 10"
        assert error_of(vision(source=str(tmp_path))) == wanted

    def test_broken_image_and_broken_file(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"image": [encoded(0), encoded(1)[:200]], "label": [0, 1]}), file)
        assert error_of(vision(source=str(file))).startswith(f"{file}: row 1: cannot be decoded")
        file.write_bytes(file.read_bytes()[:-20])
        assert error_of(vision(source=str(file))).startswith(f"{file}: is not readable as Parquet")


class TestAugment:
    def moved(self, batch: Batch, positions: list[int], strength: float = 1.0) -> torch.Tensor:
        random = SampleRandom(3, torch.tensor(positions))
        return vision({"augment": strength}).augment(batch, random)["image"]

    def test_a_pure_function_of_the_position(self) -> None:
        batch = digits_batch(4)
        together = self.moved(batch, [10, 11, 12, 13])
        for index in range(4):
            single = {name: values[index : index + 1] for name, values in batch.items()}
            assert torch.equal(self.moved(single, [10 + index])[0], together[index])
        assert torch.equal(self.moved(batch, [10, 11, 12, 13]), together)
        assert not torch.equal(self.moved(batch, [14, 15, 16, 17]), together)

    def test_strength_zero_is_the_identity_and_small_ones_are_close(self) -> None:
        batch = digits_batch(4)
        assert self.moved(batch, [0, 1, 2, 3], 0.0) is batch["image"]
        near = self.moved(batch, [0, 1, 2, 3], 1e-4)
        assert torch.allclose(near, batch["image"].float(), atol=0.2)

    def test_rotates_scales_and_shifts_up_to_its_limits(self) -> None:
        # An image that holds its own coordinates shows where each pixel was taken from.
        size, count, middle = 101, 1000, 50
        axis = torch.arange(size, dtype=torch.float64) - middle
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        image = torch.stack([x, y]).expand(count, 2, size, size)
        moved = self.moved({"image": image}, list(range(count)))
        shift = moved[:, :, middle, middle]
        right = moved[:, :, middle, middle + 1] - shift
        down = moved[:, :, middle + 1, middle] - shift
        angle = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
        scale = right.norm(dim=1)
        assert torch.allclose(down, torch.stack([-right[:, 1], right[:, 0]], dim=1))  # no shear
        for values, limit in (
            (angle, 12.0),
            (scale.log(), 0.1),
            (shift[:, 0] / size, 0.12),
            (shift[:, 1] / size, 0.12),
        ):
            assert -limit <= float(values.min()) < -0.98 * limit
            assert 0.98 * limit < float(values.max()) <= limit
            assert float(values.mean()) == pytest.approx(0, abs=0.06 * limit)
        unlike = torch.corrcoef(torch.stack([angle, scale, *shift.T])) - torch.eye(4)
        assert float(unlike.abs().max()) < 0.12  # four independent draws

    def test_keeps_range_labels_and_float64(self) -> None:
        batch = digits_batch(4)
        double = {**batch, "image": batch["image"].double()}
        moved = self.moved(double, [0, 1, 2, 3])
        assert moved.dtype == torch.float64
        assert torch.allclose(moved, self.moved(batch, [0, 1, 2, 3]).double(), atol=1e-2)
        assert moved.min() >= 0
        assert moved.max() <= 255
        workload = vision({"augment": 1.0})
        random = SampleRandom(3, torch.arange(4))
        assert workload.augment(batch, random)["label"] is batch["label"]


class TestNetwork:
    @pytest.mark.parametrize("width", [4, 7, 24])
    @pytest.mark.parametrize(("size", "channels", "blocks"), [(8, 1, [1, 1, 1]), (2, 3, [2, 1, 1])])
    def test_classes_and_shapes_come_from_the_spec_alone(
        self, width: int, size: int, channels: int, blocks: list[int]
    ) -> None:
        workload = vision(
            {"width": width, "blocks": blocks},
            source="/unreachable",
            size=size,
            channels=channels,
            classes=17,
        )
        example = workload.example()
        assert example.dtype == torch.uint8
        assert example.shape == (1, channels, size, size)
        assert workload.build()(example).shape == (1, 17)

    def test_a_transformer_with_other_patches(self) -> None:
        workload = vision({"network": "vit", "patch": 4, "blocks": [1, 2]}, size=12, channels=3)
        model = workload.build()
        assert model(workload.example()).shape == (1, 10)
        assert model.get_parameter("place").shape == (9, 24)
        assert len(workload.blocks(model)) == 3

    @pytest.mark.parametrize(
        ("model", "error"),
        [
            ({"patch": 3}, "model.patch: must divide data.size, which is 8"),
            ({"heads": 5}, "model.heads: must divide model.width, which is 24"),
        ],
    )
    def test_patches_and_heads_that_do_not_fit(self, model: dict[str, Any], error: str) -> None:
        with pytest.raises(SpecError, match=error):
            vision({"network": "vit", **model})
        vision(model)

    def test_blocks_start_as_the_identity(self) -> None:
        model = vision({"blocks": [2]}).build()
        for block in model.get_submodule("blocks").children():
            x = torch.rand(2, 24, 8, 8)
            assert torch.equal(block(x), x)

    @pytest.mark.parametrize("network", ["resnet", "vit"])
    def test_a_sample_does_not_depend_on_its_batch(self, network: str) -> None:
        workload = vision({"network": network})
        model = trained_a_little(workload).train()
        batch = digits_batch(4)
        together = workload.forward(model, batch)
        for index in range(4):
            alone = model(batch["image"][index : index + 1])[0]
            assert torch.allclose(alone, together[index], rtol=0, atol=1e-12)
        assert (together[0] - together[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("network", ["resnet", "vit"])
    def test_uint8_and_floating_images_are_the_same(self, network: str) -> None:
        model = trained_a_little(vision({"network": network}))
        image = digits_batch(4)["image"]
        assert torch.equal(model(image), model(image.double()))
        assert model(image).dtype == torch.float64

    @pytest.mark.parametrize("network", ["resnet", "vit"])
    def test_float32_agrees_with_float64_and_bf16_roughly(self, network: str) -> None:
        workload, image = vision({"network": network}), digits_batch(8)["image"]
        exact = trained_a_little(workload)(image)
        model = workload.build()
        model.load_state_dict(trained_a_little(workload).float().state_dict())
        assert torch.allclose(model.eval()(image).double(), exact, rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(image)
        assert rough.dtype == torch.float32
        assert (rough - exact).abs().max() < 0.1 * exact.abs().max()

    @pytest.mark.parametrize("network", ["resnet", "vit"])
    def test_two_sets_of_weights_at_once(self, network: str) -> None:
        workload = vision({"network": network, "label_smoothing": 0.1})
        batch = digits_batch(4)
        models = [trained_a_little(workload), workload.build().double().eval()]
        weights, buffers = torch.func.stack_module_state(models)
        assert not buffers

        def losses(one: dict[str, torch.Tensor]) -> torch.Tensor:
            output = torch.func.functional_call(models[0], one, (batch["image"],))
            return workload.loss(output, batch)

        stacked = torch.vmap(losses)(weights)
        for model, loss in zip(models, stacked, strict=True):
            apart = workload.loss(workload.forward(model, batch), batch)
            assert torch.allclose(loss, apart, rtol=0, atol=1e-10)


class TestLossAndMetrics:
    def test_labels_are_smoothed_where_gradients_are_recorded(self) -> None:
        smooth, plain = vision({"label_smoothing": 0.3}), vision()
        batch = digits_batch(4)
        output = torch.randn(4, 10, dtype=torch.float64)
        log_p = output.log_softmax(-1)
        true = -log_p.gather(1, batch["label"][:, None])[:, 0]
        assert torch.allclose(plain.loss(output, batch), true)
        assert torch.allclose(smooth.loss(output, batch), 0.7 * true - 0.3 * log_p.mean(-1))
        with torch.no_grad():
            assert torch.allclose(smooth.loss(output, batch), true)
        with torch.inference_mode():
            assert torch.allclose(smooth.loss(output, batch), true)

    def test_accuracy_of_each_sample(self) -> None:
        batch = {"label": torch.tensor([0, 1, 2])}
        output = torch.eye(10)[torch.tensor([0, 5, 2])]
        assert vision().metrics(output, batch)["accuracy"].tolist() == [1.0, 0.0, 1.0]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are slow on several threads where other programs hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("network", "lr", "right"),
    [
        ({"width": 8, "blocks": [1, 1]}, 0.01, 0.8),
        ({"network": "vit", "width": 24, "blocks": [2]}, 0.004, 0.4),
    ],
    ids=["resnet", "vit"],
)
def test_it_learns_from_prepared_digits(
    tmp_path: Path, network: dict[str, Any], lr: float, right: float
) -> None:
    workload = vision({**network, "augment": 0.5})
    folder = prepare_dataset(workload, tmp_path)
    batches = SampleStream(open_split(folder, "train"), seed=0, global_batch=64)
    torch.manual_seed(0)
    model = workload.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(150):
        positions, batch = batches.batch(step)
        batch = workload.augment(batch, SampleRandom(0, positions))
        loss = workload.loss(workload.forward(model, batch), batch).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        val = open_split(folder, "val")
        accuracy = workload.metrics(workload.forward(model, val), val)["accuracy"].mean()
    assert accuracy > right  # a constant guess is right for a tenth
