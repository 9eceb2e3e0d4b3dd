"""Tables and files of results, shared by the scripts that measure."""

import json
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCHMARKS = Path(__file__).parent / "benchmarks"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, the first column aligned left, the others right; None as a dash."""
    lines = ["| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(columns) - 1), *lines[1:]])


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Mean (least to largest)."""
    return f"{statistics.mean(values):.1f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def today(*packages: str) -> dict[str, str]:
    """The date, and the versions of packages without their local part."""
    versions = (f"{name} {version(name).split('+')[0]}" for name in packages)
    return {"date": date.today().isoformat(), "versions": ", ".join(versions)}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{names[0] if names else platform.processor()}{' with AVX-512' if 'avx512f' in flags else ''}"


def read(stem: Path) -> dict[str, Any]:
    """`stem`.json, or nothing if it does not exist."""
    file = stem.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {}


def write(stem: Path, results: dict[str, Any], text: str, picture: "Figure | None" = None) -> None:
    """Write `stem`.json, `stem`.md and `stem`.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    if picture is not None:
        picture.savefig(stem.with_suffix(".png"))
