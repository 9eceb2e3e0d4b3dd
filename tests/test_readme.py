"""The README and the pages in scripts/docs are right: their Python runs, their commands and files exist.

The README's Python blocks share one namespace, as a reader pastes them one after the other. They run in a folder that
holds image.jpg and model.onnx; small models replace the large ones, `STAND_INS`; a line that ends in `# True` must be
true. A block that imports a library of `EXTRAS` which is not installed is skipped, visibly.
"""

import importlib.util
import re
import shlex
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


def blocks(markdown, language):
    """The first line's number and the text of each fenced block."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL):
        yield markdown.count("\n", 0, found.start(1)) + 1, found[1]


def run_python(markdown):
    """Run the Python blocks; returns what was skipped. Tracebacks show the line of the Markdown text."""
    namespace, skipped = {"__name__": "__main__"}, []
    for line, text in blocks(markdown, "python"):
        imported = [name for name in EXTRAS if re.search(rf"^\s*(import|from) {name}\b", text, re.MULTILINE)]
        missing = [name for name in imported if importlib.util.find_spec(name) is None]
        if missing:
            skipped.append(f"line {line} needs {', '.join(missing)}")
            continue
        for pattern, name in STAND_INS.items():
            text = re.sub(pattern, name, text)
        text = re.sub(r"^(\S.*\S) +# True$", r"assert \1", text, flags=re.MULTILINE)
        exec(compile("\n" * (line - 1) + text, "README.md", "exec"), namespace)
    return skipped


def commands(markdown):
    """The package's commands in Bash blocks: line, and words without the program."""
    for first, text in blocks(markdown, "(?:bash|sh)"):
        for line, joined in enumerate(text.replace("\\\n", "  ").splitlines(), start=first):
            for part in re.split(r"&&|\|\||[|;]", joined):
                program = next((name for name in COMMANDS if part.strip().startswith(name)), None)
                if program:
                    yield line, shlex.split(part, comments=True)[len(program.split()) :]


def check_commands(markdown):
    """Parse every command, without running it. Raises InputError for what the parser refuses."""
    for line, words in commands(markdown):
        if words[:1] and words[0].endswith(".py"):
            assert Path(words[0]).name in SCRIPTS_OF_TIMM, f"line {line}: timm has no script {words[0]}"
        elif words not in (["--version"], ["--help"]):
            try:
                make_parser()[0].parse_args([PLACEHOLDERS.get(word, word) for word in words])
            except InputError as error:
                raise InputError(f"README.md, line {line}: {error}") from error


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside torch.onnx
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("image.jpg")
    if all(importlib.util.find_spec(name) for name in EXTRAS[:3]):
        assert main(["export", "test_c8resnet", "model.onnx"]) == 0
    assert list(blocks(README, "python"))
    skipped = run_python(README)
    if skipped:
        pytest.skip("; ".join(skipped))


def test_commands_are_commands(tmp_path, monkeypatch):
    """In a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    for file in ("output/train/first/model_best.pth.tar", "DATA/train/class/image.png"):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    assert list(commands(TEXT))
    check_commands(TEXT)


def test_files_that_it_names_exist():
    """In commands and links: recipes, scripts, pictures of this repository."""
    named = set(re.findall(r"(?<![\w/.-])((?:configs|scripts|tests|equivision_timm)/[\w./-]*\w)", TEXT))
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES[1:]}
    links = [page.parent / link for page, text in pages.items() for link in re.findall(r"\]\((\.[^)]+)\)", text)]
    assert named
    assert links
    assert not [path for path in [*(ROOT / name for name in sorted(named)), *links] if not path.exists()]


def test_pictures_are_there_and_none_lies_unused():
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


def test_models_that_it_names_exist():
    named = set(re.findall(r"`((?:test_)?[cd]\d+(?:re)?resnet\w*)`", TEXT))
    assert named
    assert not named - set(model_names())


# Controls: each check finds what it looks for


def test_a_block_that_fails_is_noticed():
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
        "python -m equivision_timm demo --output x.png",
        "cd x && equivision-timm rotate-eval --data DIR",
        "equivision-timm predict IMAGE \\\n  --model c8resnet50 --nosuch  # comment",
    ],
)
def test_a_wrong_command_is_noticed(line):
    with pytest.raises(InputError, match=r"README\.md, line 3"):
        check_commands(f"Text\n```bash\n{line}\n```\n")
