"""Small models of all kinds, trained in every way, are those of a plain loop or are refused."""

from pathlib import Path

import pytest

from tests.trainers.conformance.matrix import Cell, as_page, run_matrix

from wild_models import all_models  # isort: skip

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"
Cells = dict[str, dict[str, Cell]]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return run_matrix(tmp_path_factory.mktemp("conformance"), all_models())


@pytest.mark.parametrize("name", all_models())
def test_a_model_is_trained_as_in_a_plain_loop_or_refused(cells: Cells, name: str) -> None:
    assert {column: cell.wrong for column, cell in cells[name].items() if cell.wrong} == {}


def test_the_page_shows_what_was_found(cells: Cells) -> None:
    """Writes the page; it is right when nothing changes."""
    before = PAGE.read_text() if PAGE.exists() else ""
    page = as_page(cells)
    PAGE.write_text(page)
    assert page == before, "docs/conformance.md has been renewed: look at the change, commit it"
