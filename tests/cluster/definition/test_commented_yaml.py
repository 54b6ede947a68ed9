"""Commented YAML is read back unchanged, by YAML 1.1, which Ray uses, and by YAML 1.2."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.config import read_yaml
from cluster.definition.commented_yaml import Commented, ShellCommand, dump_commented, plain_data

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=20)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**31), 2**31),
    st.floats(0.001, 1e6).map(lambda number: round(number, 3)),
    st.sampled_from(["no", "on", "1e3", "~", "0x1", "1:30", "a: b", "- a", "# a", "2026-08-01"]),
    WORDS,
)
KEYS = st.from_regex(r"[a-z][a-z_./-]{0,12}", fullmatch=True)
DATA = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(DATA)
def test_dumped_data_is_read_back_unchanged(data: dict[str, Any]) -> None:
    assert yaml.safe_load(dump_commented(data, "of a test")) == data


def test_comments_are_at_line_ends_and_commands_keep_their_text(tmp_path: Path) -> None:
    data = {
        "kind": Commented("spot", "EDIT"),
        "nodes": [{"image": Commented("ami-0", "EDIT: yours"), "size": 3}],
        "commands": [
            ShellCommand(["ray start", "--head;"]),
            ShellCommand(["a=1", "# b=2", "run"], literal=True),
        ],
    }
    text = dump_commented(data, "Of a test.")
    (tmp_path / "file.yaml").write_text(text)
    assert yaml.safe_load(text) == read_yaml(tmp_path / "file.yaml") == plain_data(data)
    assert plain_data(data)["commands"] == ["ray start --head;", "a=1\n# b=2\nrun\n"]
    assert sum("# EDIT" in line for line in text.splitlines()) == 2
