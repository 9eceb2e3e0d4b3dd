"""The README and the pages in scripts/docs are right: their Python runs, their commands and files exist.

The README's Python blocks share one namespace, as a reader pastes them one after the other. They run in a folder that
holds image.jpg and model.onnx; models are replaced by small ones, `STAND_INS`; a line that ends in `# True` must be
true. A block that imports a library of `EXTRAS` which is not installed is skipped, visibly.
"""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from equivision_timm.cli.main import main, make_parser
from equivision_timm.errors import InputError
from equivision_timm.models import model_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "scripts" / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
STAND_INS = {  # models -> small ones of the same group
    r"\bc8resnet\w+": "test_c8resnet",
    '"d4sym_resnet50", pretrained=True': '"symmetrized", backbone="test_resnet", group_pool="prob"',
}
EXTRAS = ("onnx", "onnxscript", "onnxruntime", "openvino", "sklearn", "skimage", "escnn")
COMMANDS = ("equivision-timm", "python -m equivision_timm")
PLACEHOLDERS = {"N": "3"}  # words of commands that stand for numbers
SCRIPTS_OF_TIMM = ("train.py", "validate.py", "inference.py", "benchmark.py", "onnx_export.py")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line's number in the file, its text."""

    language: str
    line: int
    text: str


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks of a Markdown text."""
    return [
        Block(found[1], markdown.count("\n", 0, found.start(2)) + 1, found[2])
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    ]


def run_python(markdown: str) -> list[str]:
    """Run the Python blocks; returns what was skipped. Tracebacks show the line of the Markdown text."""
    namespace, skipped = {"__name__": "__main__"}, []
    for block in blocks(markdown):
        if block.language != "python":
            continue
        missing = [name for name in EXTRAS if re.search(rf"^\s*(import|from) {name}\b", block.text, re.MULTILINE)]
        missing = [name for name in missing if importlib.util.find_spec(name) is None]
        if missing:
            skipped.append(f"line {block.line} needs {', '.join(missing)}")
            continue
        text = block.text
        for pattern, name in STAND_INS.items():
            text = re.sub(pattern, name, text)
        text = re.sub(r"^(\S.*\S) +# True$", r"assert \1", text, flags=re.MULTILINE)
        exec(compile("\n" * (block.line - 1) + text, "README.md", "exec"), namespace)
    return skipped


def commands(markdown: str) -> list[tuple[int, list[str]]]:
    """The commands of ours in Bash blocks: line, and words without the program."""
    found = []
    for block in blocks(markdown):
        if block.language not in ("bash", "sh"):
            continue
        joined = block.text.replace("\\\n", "  ")
        for number, line in enumerate(joined.splitlines(), start=block.line):
            for part in re.split(r"&&|\|\||[|;]", line):
                program = next((name for name in COMMANDS if part.strip().startswith(name)), None)
                if program:
                    found.append((number, shlex.split(part, comments=True)[len(program.split()) :]))
    return found


def check_commands(markdown: str) -> int:
    """Parse every command, without running it; returns their number. Raises InputError for what the parser refuses."""
    found = commands(markdown)
    for line, words in found:
        if words[:1] and words[0].endswith(".py"):
            assert Path(words[0]).name in SCRIPTS_OF_TIMM, f"line {line}: timm has no script {words[0]}"
            continue
        if words in (["--version"], ["--help"]):
            continue
        try:
            make_parser()[0].parse_args([PLACEHOLDERS.get(word, word) for word in words])
        except InputError as error:
            raise InputError(f"README.md, line {line}: {error}") from error
    return len(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("image.jpg")
    if all(importlib.util.find_spec(name) for name in EXTRAS[:3]):
        assert main(["export", "test_c8resnet", "model.onnx"]) == 0
    assert any(block.language == "python" for block in blocks(README))
    skipped = run_python(README)
    if skipped:
        pytest.skip("; ".join(skipped))


def test_commands_are_commands() -> None:
    assert check_commands(TEXT) > 0


def test_files_that_it_names_exist() -> None:
    """In commands and links: recipes, scripts, pictures of this repository."""
    named = set(re.findall(r"(?<![\w/.-])((?:configs|scripts|tests|equivision_timm)/[\w./-]*\w)", TEXT))
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES[1:]}
    links = [page.parent / link for page, text in pages.items() for link in re.findall(r"\]\((\.[^)]+)\)", text)]
    assert named
    assert links
    assert not [path for path in [*(ROOT / name for name in sorted(named)), *links] if not path.exists()]


def test_pictures_are_there_and_none_lies_unused() -> None:
    """Those of the README have absolute addresses, which the package index needs; those of tables lie beside them."""
    address = "https://raw.githubusercontent.com/equivision-timm/equivision_timm/main/"
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert shown
    assert not [link for link in shown if not link.startswith(address)]
    used = {ROOT / link.removeprefix(address) for link in shown}
    for page in (ROOT / "scripts").rglob("*.md"):
        used |= {page.parent / link for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    kept = {path for path in (ROOT / "scripts").rglob("*") if path.suffix in (".png", ".jpg", ".svg")}
    assert used == kept


def test_models_that_it_names_exist() -> None:
    named = set(re.findall(r"`((?:test_)?[cd]\d+(?:re)?resnet\w*)`", TEXT))
    assert named
    assert not named - set(model_names())


# Controls: each check finds what it looks for


def test_a_block_that_fails_is_noticed() -> None:
    text = 'Text\n```python\nx = "c8resnet50"\n```\n\n```python\nassert x.endswith("resnet50")\n```\n'
    with pytest.raises(AssertionError) as failed:
        run_python(text)  # x is the stand-in, in the second block, too
    assert failed.traceback[-1].lineno + 1 == 7
    run_python(text.replace("assert", "assert not"))
    with pytest.raises(AssertionError):
        run_python("```python\n1 > 2  # True\n```\n")


@pytest.mark.parametrize(
    "line",
    [
        "equivision-timm lost",
        "python -m equivision_timm demo --output x.png",
        "cd x && equivision-timm rotate-eval --data DIR",
        "equivision-timm predict IMAGE \\\n  --model c8resnet50 --nosuch  # comment",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(InputError, match=r"README\.md, line 3"):
        check_commands(f"Text\n```bash\n{line}\n```\n")
