"""README and the pages of docs: their Python runs, their diffs name what is there, their links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffkernels as ff
from ffkernels import cli, recipes

from .toy_data import toy_data

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NEEDS = {"fflib": "fflib", "bioff": "bioff", "lightning": "lightning"}
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
# Blocks of code, which are neither prose nor links; what commands write into a page, which is no prose.
CODE = re.compile(r"^```.*?^```|^    .*?$", re.DOTALL | re.MULTILINE)
MADE = re.compile(r"<!-- ([\w-]+): made by .*?<!-- /\1 -->", re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """The names that a page's Python blocks leave behind; what they load as MNIST is small and learnt in seconds."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "load", lambda name: toy_data(1000, 100))
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(code, str(page), "exec"), names)
    return names


@of_each_page
@pytest.mark.filterwarnings("error:Converting a tensor")
def test_pages_run(page):
    if "```python" not in page.read_text():
        pytest.skip("no Python on it")
    if page.stem == "parallel":
        pytest.skip("a script of several processes, which test_parallel_training.py runs")
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    torch.manual_seed(0)
    names = run(page)
    if page.stem in ("README", "first-network"):
        assert names["error"] < 0.3


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 100


@pytest.mark.parametrize(
    "page",
    [
        *PAGES,
        *(
            ROOT / name
            for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "csrc/README.md")
        ),
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_lines_of_prose_are_of_120_columns_at_most(page):
    prose = re.sub(r"^\|.*$", "", CODE.sub("", MADE.sub("", page.read_text())), flags=re.MULTILINE)
    assert [line for line in prose.splitlines() if len(line) > 120] == []


@of_each_page
def test_code_fits_the_site(page):
    """At a width of 1200 a line of more columns would scroll."""
    code = "".join(re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    assert [line for line in code.splitlines() if len(line) > (120 if page.stem == "README" else 104)] == []


@of_each_page
def test_headings_images_and_links_are_readable(page):
    """One title, no level left out; a picture is told in words; a link says where it leads, and not its file."""
    text = CODE.sub("", page.read_text())
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(len(words) > 10 for words in re.findall(r"!\[([^\]]*)\]", text))
    assert re.findall(r"(?<!!)\[[^\]]*\.md\]", text.replace("[CITATION.cff]", "")) == []
    assert re.search(r"^\|[ |]*\|\n\|-", text, re.MULTILINE) is None, "a table without a head"


@of_each_page
def test_words_are_the_fields(page):
    assert re.findall(r"\b(?:twins?|at rest|in doubt|floor|visit\w*)\b", page.read_text()) == []


@pytest.mark.parametrize("page", sorted((DOCS / "tutorial").glob("*.md")), ids=lambda page: page.stem)
def test_sentences_of_the_tutorial_have_30_words_at_most(page):
    prose = re.sub(r"^(\||#|!\[).*$", "", CODE.sub("\n", page.read_text()), flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n|\n\s*\* ", prose)
    sentences = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.?!])\s", paragraph)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 30] == []


def test_the_table_of_lines_says_what_they_do():
    rows = re.findall(r"^\| `(.*)` \| `(.*?)` \|$", (DOCS / "howto" / "speed-up.md").read_text(), re.MULTILINE)
    x = torch.rand(4, 9, dtype=torch.float64)
    x[0] *= 1e-4  # where eps counts
    names = {"torch": torch, "x": x, "y": x}
    norms, goodnesses = 0, 0
    for line, said in rows:
        if said.startswith("norm="):
            options = eval(f"dict({said})")
            ours, _ = ff.linear_forward(x, torch.eye(9, dtype=torch.float64), None, activation="identity", **options)
            torch.testing.assert_close(ours, eval(line, names), rtol=1e-10, atol=0)
            norms += 1
        elif "goodness" in said:
            objective = eval(f"ff.{said}")
            torch.testing.assert_close(
                objective.goodness_of(x.square().sum(1), 9), eval(line, names), rtol=1e-10, atol=0
            )
            goodnesses += 1
    assert (norms, goodnesses) == (4, 2)


def test_the_reference_has_every_public_name():
    documented = re.findall(r"^::: ([\w.]+)$", "\n".join(map(Path.read_text, (DOCS / "reference").glob("*.md"))), re.M)
    public = {f"ffkernels.{name}" for name in ff.__all__ if name not in ("__version__", "parallel")}
    assert public | {f"ffkernels.parallel.{name}" for name in ff.parallel.__all__} <= set(documented)
    assert len(set(documented)) == len(documented)
    for name in documented:
        module, _, attribute = name.rpartition(".")
        if module.rpartition(".")[2] in NEEDS and not importlib.util.find_spec(module.rpartition(".")[2]):
            continue
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name


def test_the_command_line_page_has_every_command_and_option():
    text = (DOCS / "reference" / "command-line.md").read_text()
    (commands,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name in commands.choices:
        assert f"| `{name}` |" in text, name
    for name in ("train", "tune", "reproduce"):
        for action in commands.choices[name]._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}" in text or f" {option}" in text, option


def test_the_site_has_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES[1:])


def test_the_citation_has_the_version():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == ff.__version__


def test_templates_and_workflows_are_what_github_reads():
    yaml = pytest.importorskip("yaml")
    of_github = ROOT / ".github"
    for path in (of_github / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= template.keys()
            assert all(
                part["type"] in ("input", "textarea") and part["attributes"]["label"] for part in template["body"]
            )
    for path in (of_github / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        assert all(job["runs-on"] and all("uses" in step or "run" in step for step in job["steps"]) for job in jobs)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()


def test_the_console_script_is_there():
    scripts = re.search(r'^ffkernels = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert scripts is not None
    assert getattr(importlib.import_module(scripts[1]), scripts[2]) is cli.main


@of_each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", CODE.sub("", page.read_text())):
        assert not link or (page.parent / link).exists(), link


def diffs(page: Path) -> list[tuple[str, str]]:
    """What each diff of a page starts from, and what it ends at."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
        lines = block.splitlines()
        found.append(tuple("\n".join(line[1:] for line in lines if line[:1] in kind) for kind in (" -", " +")))
    return found


@of_each_page
def test_diffs_import_what_they_name(page):
    """Their new lines are Python; each name is in the lines they start from, or imported, and is there to import."""
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    for before, after in diffs(page):
        tree = ast.parse(after)
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ffkernels"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
                    imported.add(alias.asname or alias.name)
        names = {node.id: node.ctx for node in ast.walk(tree) if isinstance(node, ast.Name)}
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known = set(re.findall(r"\w+", before)) | imported | stored | set(vars(builtins))
        assert names.keys() <= known, names.keys() - known
        for name in imported:
            assert len(re.findall(rf"\b{name}\b", after + before)) > 1, f"{name} is imported and not used"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_as_a_loop_does(precision, tmp_path):
    lightning = pytest.importorskip("lightning")
    module = run(next(page for page in PAGES if page.stem == "lightning"))["ForwardForward"](widths=(20, 16, 12))
    x, labels = torch.rand(32, 20), torch.arange(32) % 10
    loop = ff.FFNetwork([ff.FFLinear(20, 16), ff.FFLinear(16, 12)])
    loop.load_state_dict(module.net.state_dict())
    optimizer = torch.optim.Adam(loop.parameters(), lr=0.003)
    batches = DataLoader(TensorDataset(x, labels), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, batches)
    torch.manual_seed(1)
    for _ in range(2):
        for rows, marks in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loop.step(ff.overlay_label(rows, marks), ff.overlay_label(rows, ff.wrong_label(marks)), optimizer)
    assert trainer.global_step == 8
    for name, value in loop.state_dict().items():
        assert torch.equal(value, module.net.state_dict()[name]), name
    accuracy = trainer.validate(module, batches, verbose=False)[0]["accuracy"]
    assert accuracy == pytest.approx(float((loop.predict(x) == labels).float().mean()), abs=0.05)


def test_the_table_of_files_has_the_order_that_imports_keep():
    """CONTRIBUTING's rows are the layers of import-linter's contract, the highest first."""
    root = Path(__file__).parents[1]
    layers = re.search(r"containers = .*?^layers = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S)
    assert layers is not None
    ranks = {
        name: rank for rank, line in enumerate(layers[1].strip().splitlines()) for name in re.findall(r"\w+", line)
    }
    first_cells = re.findall(r"^\| (`.*?) \|", (root / "CONTRIBUTING.md").read_text(), re.M)
    named = [re.match(r"\w+", name)[0] for cell in first_cells for name in re.findall(r"`(\S+?)`", cell)]
    rows = [name for name in named if name in ranks]
    assert [ranks[name] for name in rows] == sorted(ranks[name] for name in rows)
    package = {
        path.stem for path in (root / "ffkernels").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert set(rows) == package - {"__init__", "__main__", "_version"}
