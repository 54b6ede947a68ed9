"""Specs as files, overrides and models, and the exact message for every mistake in them."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from cluster.base import config
from cluster.base.config import (
    Spec,
    apply_overrides,
    did_you_mean,
    flatten,
    read_yaml,
    validate,
    with_value,
    write_yaml,
)
from cluster.base.errors import SpecError


class Mirror(Spec):
    width: Annotated[float, Field(gt=0)] = 2.0
    shape: Literal["flat", "curved"] = "flat"
    tilts: tuple[float, float] = (0.0, 90.0)


class Plant(Spec):
    name: str
    count: Annotated[int, Field(ge=1)] | tuple[int, int] = 1
    mirror: Mirror = Mirror()
    spare: Mirror | None = None
    extra: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of_each(self) -> "Plant":
        if self.count == 13:
            raise ValueError("count and luck exclude each other")
        return self


def text_file(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestReadYaml:
    @pytest.mark.parametrize(
        ("written", "value"),
        [
            ("3e-4", 3e-4),
            ("1e3", 1000.0),
            (".5", 0.5),
            ("0o17", 15),
            ("017", 17),
            ("0x1F", 31),
            ("12:30:00", "12:30:00"),
            ("no", "no"),
            ("yes", "yes"),
            ("on", "on"),
            ("off", "off"),
            ("y", "y"),
            ("true", True),
            ("False", False),
            ("null", None),
            ("~", None),
            ("'3e-4'", "3e-4"),
        ],
    )
    def test_scalars_are_those_of_yaml_1_2(
        self, tmp_path: Path, written: str, value: object
    ) -> None:
        read = read_yaml(text_file(tmp_path, f"key: {written}\n"))["key"]
        assert read == value
        assert type(read) is type(value)

    @pytest.mark.parametrize("text", ["", "# only a remark\n", "---\n"])
    def test_an_empty_file_is_an_empty_mapping(self, tmp_path: Path, text: str) -> None:
        assert read_yaml(text_file(tmp_path, text)) == {}

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("a: 1\nb: [1, 2\n", ":3:1: broken YAML: "),
            ("a: 1\nb: 'open\n", ":3:1: broken YAML: "),
            ("a:\n\t- b\n", ":2:1: broken YAML: "),
            ("a: *nowhere\n", ":1:4: broken YAML: found undefined alias 'nowhere'"),
            ("a: !!python/name:os.system\n", ":1:4: broken YAML: could not determine a constr"),
            ("a: 1\n---\nb: 2\n", ":2:1: broken YAML: "),
            ("lr: 1\nx: 2\nlr: 3\n", ':3:1: broken YAML: found duplicate key "lr"'),
            ("train:\n  lr: 1\n  lr: 2\n", ':3:3: broken YAML: found duplicate key "lr"'),
            ("a: \x01\n", ": broken YAML: unacceptable character"),
            ("day: 2026-99-99\n", ": broken YAML: "),
            ("a: !!int three\n", ": broken YAML: "),
            ("a: !!bool maybe\n", ": broken YAML: "),
            ("[1, 2]\n", ": must be a mapping of sections (got [1, 2])"),
            ("just words\n", ": must be a mapping of sections (got 'just words')"),
        ],
    )
    def test_a_file_that_is_no_spec_gives_one_line_with_its_position(
        self, tmp_path: Path, text: str, place: str
    ) -> None:
        path = text_file(tmp_path, text)
        with pytest.raises(SpecError) as caught:
            read_yaml(path)
        message = str(caught.value)
        assert message.startswith(str(path) + place)
        assert "\n" not in message

    def test_an_unreadable_file_gives_one_line(self, tmp_path: Path) -> None:
        latin = tmp_path / "latin.yaml"
        latin.write_bytes(b"name: caf\xe9\n")
        for path, reason in (
            (tmp_path / "none.yaml", "No such file or directory"),
            (tmp_path, "Is a directory"),
            (latin, "is not UTF-8 text"),
        ):
            with pytest.raises(SpecError) as caught:
                read_yaml(path)
            assert str(caught.value) == f"{path}: {reason}"


AWKWARD = ["", "no", "3e-4", "1.0", "null", "~", "True", "0o17", "2026-01-02", "- a", "a: b", "#"]
AWKWARD += ["two\nlines\n", "\n", " x ", "tab\t", "'", '"', "{", "[a]", "&a", "*a", "!t", "%", "@"]
AWKWARD += ["Ä€", "🔥", "\u2028", "\x07", "\r\n", "<<", "=", "? x", "---", "...", "x" * 200]
# Of all characters only U+0085, which ruamel.yaml folds into a space, does not come back.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\x85")
WORDS = st.sampled_from(AWKWARD) | st.text(CHARACTERS, max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(data=st.dictionaries(WORDS, VALUES, max_size=4))
@example(data={word: [word, {word: word}] for word in AWKWARD})
@example(data={"tiny": 1e-07, "huge": 1e22, "whole": 3.0, "inf": float("inf"), "zero": -0.0})
def test_written_data_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    write_yaml(data, path, comment="a: 1\n- of two lines")
    assert path.read_text().startswith("# a: 1\n# - of two lines\n")
    read = read_yaml(path)
    assert repr(read) == repr(data)  # also types, the sign of zero, and the order of keys


class TestOverride:
    def test_values_are_parsed_as_yaml_and_sections_created(self) -> None:
        data = {"train": {"steps": 10, "seed": 1}}
        assignments = ["train.steps=2e1", "a.b.c=[1, x]", "note=no", "train.clip=", "n=x=y"]
        changed = apply_overrides(data, assignments)
        assert changed == {
            "train": {"steps": 20.0, "seed": 1, "clip": None},
            "a": {"b": {"c": [1, "x"]}},
            "note": "no",
            "n": "x=y",
        }
        assert data == {"train": {"steps": 10, "seed": 1}}

    def test_the_last_override_of_a_path_wins(self) -> None:
        assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("optimizer.lr", "--set optimizer.lr: must look like optimizer.lr=3e-4"),
            ("=3", "--set =3: must look like optimizer.lr=3e-4"),
            ("a=[1", "--set a:1:3: broken YAML: expected ',' or ']', but got '<stream end>'"),
            ("train.steps.x=1", "train.steps: has no key 'x', it is 10"),
            ("train.steps.x.y=1", "train.steps: has no key 'x.y', it is 10"),
        ],
    )
    def test_mistakes(self, assignment: str, message: str) -> None:
        with pytest.raises(SpecError) as caught:
            apply_overrides({"train": {"steps": 10}}, [assignment])
        assert str(caught.value) == message


KEYS = st.sampled_from(["a", "b", "cc"])
TREES = st.recursive(
    st.dictionaries(KEYS, st.integers(), max_size=3),
    lambda inner: st.dictionaries(KEYS, st.integers() | inner.filter(bool), max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(data=TREES)
def test_flatten_and_with_value_are_inverse(data: dict[str, Any]) -> None:
    rebuilt: dict[str, Any] = {}
    for path, value in flatten(data).items():
        rebuilt = with_value(rebuilt, path, value)
    assert rebuilt == data


def test_flatten_keeps_lists_whole_and_drops_empty_sections() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}], "d": {}}, "e": None}) == {
        "a.b": [1, {"c": 2}],
        "e": None,
    }


def test_with_value_changes_an_element_of_a_list() -> None:
    data = {"a": {"betas": (0.9, 0.99), "layers": [{"width": 1}, {"width": 2}]}}
    assert with_value(data, "a.betas.1", 0.5)["a"]["betas"] == [0.9, 0.5]
    changed = with_value(data, "a.layers.0.width", 5)
    assert changed["a"]["layers"] == [{"width": 5}, {"width": 2}]
    assert data["a"]["layers"][0] == {"width": 1}
    for path in ("a.betas.2", "a.betas.-1", "a.betas.x"):
        with pytest.raises(SpecError, match=r"^a.betas: has no key"):
            with_value(data, path, 0.5)


def test_with_value_finds_keys_that_have_dots() -> None:
    data = {"when": {"a.b": 1, "a.bc": {"d": 2}, "a": 3}}
    assert with_value(data, "when.a.b", 5) == {"when": {"a.b": 5, "a.bc": {"d": 2}, "a": 3}}
    assert with_value(data, "when.a.bc.d", 5) == {"when": {"a.b": 1, "a.bc": {"d": 5}, "a": 3}}
    assert with_value(data, "when.a", 5) == {"when": {"a.b": 1, "a.bc": {"d": 2}, "a": 5}}
    with pytest.raises(SpecError, match=r"^when.a: has no key 'x', it is 3$"):
        with_value(data, "when.a.x", 5)


def test_with_value_fills_a_section_that_is_null() -> None:
    assert with_value({"model": None}, "model.width", 3) == {"model": {"width": 3}}


class TestCheck:
    def test_good_data_is_a_frozen_model_with_defaults(self) -> None:
        spec = validate(Plant, {"name": "n", "mirror": {"width": 3}})
        assert spec == Plant(name="n", mirror=Mirror(width=3.0))
        with pytest.raises(ValueError, match="frozen"):
            spec.name = "other"  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "name: is required"),
            ({"nam": 1, "name": "n"}, "nam: unknown key; did you mean 'name'?"),
            ({"mirror": {"widht": 1}}, "mirror.widht: unknown key; did you mean 'width'?"),
            ({"spare": {"widht": 1}}, "spare.widht: unknown key; did you mean 'width'?"),
            ({"mirror": {"q": 1}}, "mirror.q: unknown key (known: width, shape, tilts)"),
            ({"name": 3}, "name: must be a valid string (got 3)"),
            ({"name": None}, "name: must be a valid string (got None)"),
            (
                {"mirror": {"width": "wide"}},
                "mirror.width: must be a valid number, unable to parse string as a number "
                "(got 'wide')",
            ),
            ({"mirror": {"width": -1}}, "mirror.width: must be greater than 0 (got -1)"),
            (
                {"mirror": {"width": float("nan")}},
                "mirror.width: must be a finite number (got nan)",
            ),
            (
                {"mirror": {"width": float("inf")}},
                "mirror.width: must be a finite number (got inf)",
            ),
            ({"mirror": {"shape": "flt"}}, "mirror.shape: must be 'flat' or 'curved' (got 'flt')"),
            ({"mirror": 3}, "mirror: must be a mapping (got 3)"),
            ({"mirror": None}, "mirror: must be a mapping (got None)"),
            ({"extra": [1]}, "extra: must be a mapping (got [1])"),
            (
                {"count": 0},
                "count: must be greater than or equal to 1 or must be a valid tuple (got 0)",
            ),
            (
                {"mirror": {"tilts": [1, "x"]}},
                "mirror.tilts.1: must be a valid number, unable to parse string as a number "
                "(got 'x')",
            ),
            (
                {"name": "x" * 99, "mirror": "y" * 99},
                f"mirror: must be a mapping (got '{'y' * 56}...)",
            ),
        ],
    )
    def test_each_mistake_is_one_line(self, data: dict[str, Any], message: str) -> None:
        complete = data if not data else {"name": "n", **data}
        with pytest.raises(SpecError) as caught:
            validate(Plant, complete)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("data", "path"),
        [
            ({"mirror": {"tilts": [1]}}, "mirror.tilts"),
            ({"mirror": {"tilts": [1, 2, 3]}}, "mirror.tilts"),
            ({"mirror": {"tilts": 4}}, "mirror.tilts"),
            ({"count": [1]}, "count"),
            ({"count": [1, 2, 3]}, "count"),
            ({"count": "many"}, "count"),
            ({1: 2}, "1"),
        ],
    )
    def test_pydantics_other_errors_name_the_field(self, data: dict[str, Any], path: str) -> None:
        with pytest.raises(SpecError) as caught:
            validate(Plant, {"name": "n", **data})
        for line in str(caught.value).splitlines():
            assert line.startswith(path)
            assert "function-" not in line
            assert "tuple[" not in line

    def test_all_mistakes_are_reported_one_per_line(self) -> None:
        data = {"count": 1, "mirror": {"width": 0, "hape": 1}, "spare": {"shape": "x"}}
        with pytest.raises(SpecError) as caught:
            validate(Plant, data)
        assert set(str(caught.value).splitlines()) == {
            "name: is required",
            "mirror.width: must be greater than 0 (got 0)",
            "mirror.hape: unknown key; did you mean 'shape'?",
            "spare.shape: must be 'flat' or 'curved' (got 'x')",
        }

    def test_a_models_own_message_is_kept(self) -> None:
        with pytest.raises(SpecError, match=r"^count and luck exclude each other"):
            validate(Plant, {"name": "n", "count": 13})

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"width": 0}, "model.width: must be greater than 0 (got 0)"),
            ({"widht": 1}, "model.widht: unknown key; did you mean 'width'?"),
            (7, "model: must be a mapping (got 7)"),
            (None, "model: must be a mapping (got None)"),
        ],
    )
    def test_each_path_begins_with_the_prefix(self, data: Any, message: str) -> None:
        with pytest.raises(SpecError) as caught:
            validate(Mirror, data, "model.")
        assert str(caught.value) == message


def test_did_you_mean() -> None:
    assert did_you_mean("adamm", ["sgd", "adamw"]) == "; did you mean 'adamw'?"
    assert did_you_mean("rmsprop", ["sgd", "adamw"]) == " (known: sgd, adamw)"
    assert did_you_mean("x", []) == ""


class TestRenamedFields:
    """A field that was renamed is read under its old name, with one warning."""

    class Mirror(Spec):
        renamed_fields = {"size": "diameter_m"}
        diameter_m: Annotated[float, Field(gt=0)] = 1.0

    class Plant(Spec):
        renamed_fields = {"parts": "mirror"}
        mirror: "TestRenamedFields.Mirror | None" = None

    @pytest.fixture(autouse=True)
    def warn_again(self) -> None:
        config._warn_of_old_name.cache_clear()

    def test_an_old_name_is_read_and_a_warning_names_both(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            plant = validate(self.Plant, {"parts": {"size": 2.5}}, "site.")
            assert plant.mirror == self.Mirror(diameter_m=2.5)
        assert caplog.messages == [
            "site.parts: is called site.mirror now; the old name still works",
            "site.mirror.size: is called site.mirror.diameter_m now; the old name still works",
        ]

    @pytest.mark.parametrize(
        ("data", "diameter_m"),
        [({"size": 2, "diameter_m": 3}, 3), ({"diameter_m": 3, "size": 2}, 2)],
    )
    def test_the_name_that_was_set_last_counts(self, data: Any, diameter_m: float) -> None:
        assert validate(self.Mirror, data).diameter_m == diameter_m

    def test_a_mistake_is_told_under_the_current_name(self) -> None:
        with pytest.raises(SpecError, match=r"^mirror\.diameter_m: must be greater than 0"):
            validate(self.Plant, {"mirror": {"size": -1}})
        with pytest.raises(SpecError, match=r"^mirror\.sizes: unknown key"):
            validate(self.Plant, {"mirror": {"sizes": 1}})


TestRenamedFields.Plant.model_rebuild()
