"""What hosting platforms read of a repository: the citation, the issue forms, the changelog."""

import tomllib
from pathlib import Path

import pytest
import yaml

import gistkern

ROOT = Path(__file__).parents[1]


def test_the_citation_is_valid_and_names_the_papers():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found.keys() >= {"cff-version", "message", "title", "authors", "abstract", "keywords", "references"}
    assert found["cff-version"] == "1.2.0"
    assert "date-released" not in found, "there is no release yet"
    assert found["version"] == gistkern.__version__
    assert found["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert len(set(found["keywords"])) == len(found["keywords"])
    for one in found["references"]:
        assert one["type"] in ("article", "conference-paper")
        assert one["title"]
        assert 2022 <= one["year"] <= 2026
        assert all(author.keys() == {"family-names", "given-names"} for author in one["authors"])
    readme = (ROOT / "README.md").read_text()
    cited = readme[readme.index("## Citing") :] if "## Citing" in readme else ""
    first = {one["authors"][0]["family-names"] for one in found["references"]}
    assert not [name for name in ("Mu", "Chevalier", "Zhang", "Xiao", "Mohtashami", "Dao") if name not in first]
    assert not cited or all(name in cited for name in first)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[!c]*.yml")), ids=lambda p: p.stem)
def test_a_form_asks_for_what_helps(path):
    form = yaml.safe_load(path.read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [one for one in form["body"] if one["type"] != "markdown"]
    assert len({one["id"] for one in fields}) == len(fields)
    assert all(one["attributes"]["label"] for one in fields)
    assert any(one.get("validations", {}).get("required") for one in fields)
    if path.stem != "feature":
        assert "gistkern doctor" in path.read_text()


def test_the_changelog_is_by_release_and_short():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "\n## Unreleased\n" in text
    assert f"\n## {gistkern.__version__}\n" in text
    assert len(text.split()) < 500
