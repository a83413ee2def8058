"""The list behind the reading map agrees with the registry and with the notebooks, and
names nothing that is not there."""

import copy
from functools import cache

import pytest
import yaml
from book import ROOT, read_book
from claims import main_chapters

import attn_notes as an

LIST = yaml.safe_load((ROOT / "nbs" / "reading_list.yaml").read_text(encoding="utf-8"))
NEEDED = {"name", "title", "authors", "year", "task"}
FURTHER = {"arxiv", "url", "chapter", "beside", "builds_on"}
TASKS = "text images detection segmentation other efficiency survey".split()
CHAPTERS = {n.name for n in read_book()}
MAIN = {n.name for n in main_chapters(read_book())} - {"reading_map"}


@cache
def registered() -> frozenset[tuple[str, str, int]]:
    """Chapter, authors and year of every registered model."""
    infos = [an.model_info(name) for name in an.list_models()]
    return frozenset((i.chapter, i.paper.rpartition(" ")[0], i.year) for i in infos)


def home(paper: dict) -> str:
    return paper.get("chapter", paper.get("beside", ""))


def posted(paper: dict) -> int:
    """The year of the first posting: that of the number on arXiv, if there is one."""
    number = paper.get("arxiv")
    return 2000 + int(number[:2]) if number else paper["year"]


def faults(reading: dict, chapters: set[str], models) -> list[str]:
    """What is wrong with the list, a line each."""
    papers, follows = reading["papers"], reading["follows"]
    wrong = []
    for chapter in follows:
        number = chapter[: chapter.index("_") + 1]
        there = [name for name in chapters if name.startswith(number)]
        wrong += [f"{name} is there: take {chapter} off `follows`" for name in there]
    steps = [chapter for route in reading["routes"] for chapter in route["read"]]
    for chapter in sorted({*filter(None, map(home, papers)), *steps}):
        if chapter not in chapters and chapter not in follows:
            wrong.append(f"there is no notebook {chapter}, nor does it follow")
    at = {(home(paper), paper["authors"], paper["year"]) for paper in papers}
    wrong += [f"{model} is registered and not on the map" for model in models - at]
    shown = {paper["chapter"] for paper in papers if "chapter" in paper}
    listed = {home(paper) for paper in papers}
    wrong += [f"no paper leads to {name}" for name in (MAIN & chapters) - listed]
    wrong += [f"{name} follows without a paper" for name in {*follows} - shown]
    by_name = {paper["name"]: paper for paper in papers}
    if len(by_name) < len(papers):
        wrong.append("a name stands twice")
    for paper in papers:
        for parent in paper.get("builds_on", ()):
            if parent not in by_name:
                wrong.append(f"{paper['name']} builds on {parent}, which is not listed")
            elif posted(by_name[parent]) > posted(paper):
                wrong.append(f"{paper['name']} is older than {parent}")
    for source in reading["sources"]:
        if source["paper"] not in by_name:
            wrong.append(f"{source['paper']} is a source, not listed")
    return wrong


def test_the_list_agrees_with_the_registry_and_the_notebooks():
    assert faults(LIST, CHAPTERS, registered()) == []


@pytest.mark.parametrize("paper", LIST["papers"], ids=lambda p: p["name"])
def test_every_paper_says_what_it_is_and_where(paper):
    assert NEEDED <= {*paper} <= NEEDED | FURTHER
    assert ("arxiv" in paper) != ("url" in paper), "one address"
    assert not {"chapter", "beside"} <= {*paper}, "in a chapter of its own or beside"
    assert paper["task"] in TASKS and 1990 < paper["year"] < 2030
    assert isinstance(paper.get("arxiv", ""), str), "quotes around the number"
    assert 0 <= paper["year"] - posted(paper) <= 1, "posted, then published"


def test_a_model_without_a_paper_is_noticed():
    reading = copy.deepcopy(LIST)
    reading["papers"] = [p for p in reading["papers"] if p["name"] != "CvT"]
    found = faults(reading, CHAPTERS, registered())
    assert any("vision/07_cvt" in fault for fault in found)


def test_another_year_than_the_registry_s_is_noticed():
    reading = copy.deepcopy(LIST)
    next(p for p in reading["papers"] if p["name"] == "DETR")["year"] = 2019
    assert any(
        "detection/01_detr" in f for f in faults(reading, CHAPTERS, registered())
    )


def test_a_chapter_that_is_gone_is_noticed():
    found = faults(LIST, CHAPTERS - {"vision/06_pvt"}, registered())
    assert "there is no notebook vision/06_pvt, nor does it follow" in found


def test_a_chapter_that_came_is_noticed_whatever_its_name():
    reading = LIST | {"follows": ["vision/99_to_come"]}
    found = faults(reading, CHAPTERS | {"vision/99_by_another_name"}, registered())
    assert any("vision/99_by_another_name is there" in fault for fault in found)


def test_a_parent_that_is_not_listed_or_younger_is_noticed():
    reading = copy.deepcopy(LIST)
    by_name = {p["name"]: p for p in reading["papers"]}
    by_name["ViT"]["builds_on"] = ["ResNet", "Swin"]
    found = faults(reading, CHAPTERS, registered())
    assert "ViT builds on ResNet, which is not listed" in found
    assert "ViT is older than Swin" in found


def test_the_stored_page_shows_every_paper():
    """Each paper is a row of the page; one whose chapter is there links to it."""
    page = next(n for n in read_book() if n.name == "reading_map")
    shown = "".join(
        "".join(output.get("data", {}).get("text/markdown", ""))
        for cell in page.code()
        for output in cell.outputs
    )
    for paper in LIST["papers"]:
        name = paper["name"]
        if home(paper) in CHAPTERS:
            name = f"[{name}]({home(paper)}.ipynb)"
        assert f"| {name} | *{paper['title']}*" in shown, paper["name"]
