import doctest
import re
from pathlib import Path

import pytest

from flowback import TarFlow

DOCS = Path(__file__).parents[1]


def code_blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / file).read_text("utf-8"), flags=re.DOTALL)


def test_the_check_of_the_published_algorithm_shows_what_the_text_says(capsys):
    (block,) = code_blocks("docs/method.md")
    exec(block, {})
    first, second, third = eval(capsys.readouterr().out)
    assert first > 0
    assert second == third == 0
    exec(block.replace("h = out.hidden[1]", "h = flow.blocks[t - 1](x_rev, hidden=[1]).hidden[1]"), {})
    assert min(eval(capsys.readouterr().out)) > 0


@pytest.fixture
def quickstart(trained, tmp_path, monkeypatch):
    """A folder in which the flow of the quickstart lies, small and trained for seconds."""
    blocks = TarFlow(image_size=8, channels=1, num_classes=10, levels=17, patch_size=2, width=32, blocks=4, layers=2)
    for folder, flow in (("aligned", blocks), ("plain", trained)):
        flow.save_pretrained(tmp_path / "runs" / "quickstart" / folder / "checkpoints" / "step_00001000")
    monkeypatch.chdir(tmp_path)


def run_blocks(file: str) -> dict:
    """Run every block of Python, in order, as one program; the names that it leaves."""
    names = {}
    for number, block in enumerate(code_blocks(file)):
        exec(compile(block, f"{file}, block {number + 1}", "exec"), names)
    return names


def test_the_readme_runs(quickstart):
    names = run_blocks("README.md")
    assert names["x"].shape == (2, 1, 8, 8)
    assert names["z"].shape == (2, 16, 4)
    assert names["log_det"].shape == (2,)
    assert float((names["x"] - names["x_again"]).detach().abs().max()) < 1e-4


def test_the_first_steps_run(quickstart):
    names = run_blocks("docs/first_steps.md")
    assert all(p.grad is not None for p in names["align"].projector.parameters())
    assert {"nll", "align"} <= set(names["parts"])


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{file.name}" for file in sorted((DOCS / "docs").glob("*.md")))])
def test_sessions_in_the_documentation_are_what_python_prints(file, quickstart):
    failed, _ = doctest.testfile(str(DOCS / file), module_relative=False, encoding="utf-8")
    assert failed == 0
