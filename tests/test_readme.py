import re
from pathlib import Path

import equigrad as eg

README = Path(__file__).parent.parent / "README.md"


def test_the_example_has_twelve_lines_and_runs(capsys):
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    scope = {}
    exec(compile(example, str(README), "exec"), scope)
    assert len([line for line in example.splitlines() if line]) == 12
    result, meta_params = scope["result"], scope["meta_params"]
    assert isinstance(result, eg.MetaGradient)
    assert result.status.startswith("converged")
    assert all(m.grad is not None and m.grad.any() for m in meta_params.values())
    assert "torch.Size([10, 64])" in capsys.readouterr().out


def test_pictures_are_there():
    for page in [README, *README.parent.glob("docs/*.md")]:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name}: {picture}"
