import re
from pathlib import Path

DOCS = Path(__file__).parents[1]


def code_blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / file).read_text(), flags=re.DOTALL)


def test_the_check_of_the_published_algorithm_shows_what_the_text_says(capsys):
    (block,) = code_blocks("docs/method.md")
    exec(block, {})
    first, second, third = eval(capsys.readouterr().out)
    assert first > 0
    assert second == third == 0
    exec(block.replace("h = out.hidden[1]", "h = flow.blocks[t - 1](x_rev, hidden=[1]).hidden[1]"), {})
    assert min(eval(capsys.readouterr().out)) > 0


def test_the_readme_runs(tmp_path, monkeypatch):
    from flowback import TarFlow

    flow = TarFlow(image_size=8, channels=1, patch_size=2, width=32, blocks=4, layers=2, num_classes=10, levels=17)
    flow.save_pretrained(tmp_path / "runs/quickstart/aligned/checkpoints/step_00001000")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_blocks("README.md"):
        exec(block, names)
    assert names["x"].shape == (2, 1, 8, 8)
    assert float((names["x"] - names["x_again"]).abs().max()) < 1e-4
    assert all(p.grad is not None for p in names["align"].projector.parameters())
