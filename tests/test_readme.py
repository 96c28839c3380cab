import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_improves_the_test_accuracy_as_the_text_says(capsys):
    text = README.read_text()
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    scope = {}
    exec(compile(example, str(README), "exec"), scope)
    before, after = map(float, re.findall(r"test accuracy ([\d.]+)", capsys.readouterr().out))
    said = re.search(r"prints ([\d.]+), then ([\d.]+),", text)
    assert said
    assert abs(before - float(said[1])) < 0.02
    assert abs(after - float(said[2])) < 0.02
    assert scope["result"].status.startswith("converged")
    assert scope["result"].error_estimate < 0.2


def test_every_link_and_picture_is_there():
    """In the repository, where README and pages are read as they are, anchors included."""
    root = README.parent
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not anchor or anchor in anchors, f"{page.name}: {link}"
