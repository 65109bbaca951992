"""The generated blocks of the recipes' pages are what the recipes say today."""

import re
from dataclasses import replace

import pytest
from click.testing import CliRunner

from cookbook import pages
from cookbook.pages import Page, block, explained, index, plans_of, table

PAGES = list(pages.pages())
HYDRAGEN = next(page for page in PAGES if page.recipe.name == "hydragen")


@pytest.fixture(scope="module")
def plans():
    """What the compiler makes of every recipe, by module."""
    return {page.module: plans_of(page.recipe) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.module.removeprefix("cookbook."))
def test_the_explain_block_of_a_page_is_up_to_date(page, plans):
    text = page.path.read_text(encoding="utf-8")
    assert block(text, "explain", explained(plans[page.module])) == text, f"run python cookbook/pages.py {page.path.stem}"


def test_the_table_of_recipes_is_up_to_date(plans):
    text = pages.README.read_text(encoding="utf-8")
    lines = index([(page, plans[page.module]) for page in PAGES])
    assert block(text, "recipes", lines) == text, "run python cookbook/pages.py"
    assert all(any(f"]({name}.md)" in line for line in lines) for name in pages.COMPOSITIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.module.removeprefix("cookbook."))
def test_the_table_of_a_page_is_there(page):
    (lines,) = re.findall(r"^<!-- table -->$(.*?)^<!-- end -->$", page.path.read_text(encoding="utf-8"), re.M | re.S)
    assert lines.strip(), f"run python cookbook/pages.py {page.path.stem}"


def test_nothing_in_an_explain_block_depends_on_the_machine(plans, monkeypatch):
    monkeypatch.setattr(pages, "TARGET", "cuda:sm_90")
    assert explained(plans_of(HYDRAGEN.recipe)) == explained(plans[HYDRAGEN.module])


def test_check_names_the_page_that_is_out_of_date_and_leaves_it(tmp_path, monkeypatch):
    path = pages.COOKBOOK / "attention" / "hydragen.md"
    stale = tmp_path / "cookbook" / "attention" / "hydragen.md"
    stale.parent.mkdir(parents=True)
    old = block(path.read_text(encoding="utf-8"), "explain", ["| kernel | of another day |"])
    stale.write_text(old, encoding="utf-8")
    monkeypatch.setattr(pages, "COOKBOOK", tmp_path / "cookbook")
    monkeypatch.setattr(pages, "pages", lambda names: iter([replace(HYDRAGEN, path=stale)]))
    result = CliRunner().invoke(pages.main, ["--check", "hydragen"])
    assert result.exit_code == 1
    assert "out of date: attention/hydragen.md" in result.output
    assert stale.read_text(encoding="utf-8") == old
    assert CliRunner().invoke(pages.main, ["--no-tables", "hydragen"]).exit_code == 0
    assert CliRunner().invoke(pages.main, ["--check", "hydragen"]).exit_code == 0
    assert stale.read_text(encoding="utf-8").partition("<!-- explain -->")[0] == old.partition("<!-- explain -->")[0]


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    result = CliRunner().invoke(pages.main, ["--check", "hydra"])
    assert result.exit_code == 2
    assert "attention/hydragen" in result.output


def test_a_page_without_its_block_is_refused():
    with pytest.raises(ValueError, match="0 blocks `<!-- explain -->`"):
        block("# A page\n<!-- table -->\n<!-- end -->\n", "explain", ["x"])


def test_only_the_block_changes():
    text = "a\n<!-- explain -->\nold\n<!-- end -->\nb\n<!-- table -->\nkept\n<!-- end -->\nc\n"
    new = "a\n<!-- explain -->\n\nnew\n\n<!-- end -->\nb\n<!-- table -->\nkept\n<!-- end -->\nc\n"
    assert block(text, "explain", ["new"]) == new
    assert block(new, "explain", ["new"]) == new


def test_a_picture_is_written_beside_the_page_only_if_it_is_asked_for(tmp_path):
    def show(folder):
        (folder / "drawn.png").write_text("a picture")
        return ["| a |", "|---|", "| 1 |"]

    page = Page(replace(HYDRAGEN.recipe, show=show), "", tmp_path / "page.md")
    assert table(page, pictures=False) == ["| a |", "|---|", "| 1 |"]
    assert not (tmp_path / "drawn.png").exists()
    table(page, pictures=True)
    assert (tmp_path / "drawn.png").exists()


def test_lines_that_are_no_table_stand_as_they_are(tmp_path):
    page = Page(replace(HYDRAGEN.recipe, show=lambda folder: ["a  1", "b  2"]), "", tmp_path / "page.md")
    assert table(page, pictures=False) == ["```text", "a  1", "b  2", "```"]
