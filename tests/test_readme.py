import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_improves_the_test_accuracy_as_the_text_says(capsys):
    text = README.read_text()
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    scope = {}
    exec(compile(example, str(README), "exec"), scope)
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", capsys.readouterr().out))
    said = re.search(r"prints ([\d.]+) before and ([\d.]+) after", text)
    assert said
    assert abs(before - float(said[1])) < 0.02
    assert abs(after - float(said[2])) < 0.02
    assert scope["result"].status.startswith("converged")
    assert scope["result"].error_estimate < 0.2


def test_pictures_are_there():
    for page in [README, *README.parent.glob("docs/*.md")]:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name}: {picture}"
