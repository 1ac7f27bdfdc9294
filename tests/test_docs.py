"""The pages of docs with Python in them: it runs, their diffs name what is there, their links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffkernels as ff

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "classes.md", DOCS / "convolution.md", *sorted((DOCS / "integrations").glob("*.md"))]
# Whose Python is a script of several processes, which `tests/test_parallel_training.py` runs.
OF_PROCESSES = DOCS / "parallel.md"
NEEDS = {"fflib": "fflib", "bioff": "bioff", "lightning": "lightning"}


def run(page: Path) -> dict[str, Any]:
    """The names that a page's Python blocks leave behind."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run(page):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    assert run(page)


@pytest.mark.parametrize("page", [*PAGES, OF_PROCESSES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        assert not link or (page.parent / link).exists(), link


def diffs(page: Path) -> list[tuple[str, str]]:
    """What each diff of a page starts from, and what it ends at."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL):
        lines = block.splitlines()
        found.append(tuple("\n".join(line[1:] for line in lines if line[:1] in kind) for kind in (" -", " +")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
