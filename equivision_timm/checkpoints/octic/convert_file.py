"""A checkpoint file of octic-vits -> a model folder of ours, and a report."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from equivision_timm.checkpoints.folder import write_model_folder
from equivision_timm.checkpoints.octic.read_file import read_octic
from equivision_timm.checkpoints.octic.released import SOURCE, released
from equivision_timm.checkpoints.octic.translate import invariants_of, translate
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors

__all__ = ["Report", "convert_file"]


@dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        folder: the model folder that was written.
        provenance: where the weights come from, as written into the file.
    """

    folder: Path
    provenance: dict[str, str]

    def __str__(self) -> str:
        rows = {"written": str(self.folder), **self.provenance}
        return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def convert_file(checkpoint_path: str | Path, model_name: str, out_folder: str | Path) -> Report:
    """Convert a checkpoint file into `model.safetensors` and `config.json`; nothing is written unless all went well.

    Args:
        checkpoint_path: file of octic-vits, see `read_octic`.
        model_name: the model, e.g. 'd4vit_large_patch16_224'.
        out_folder: the folder to write.

    Raises:
        ValueError: not a checkpoint, one of another model, or a model that octic-vits has no weights of.
        OSError: a file cannot be read or written.
    """
    if model_name not in released():
        raise ValueError(f"octic-vits has no weights of {model_name}; there are: {', '.join(released())}")
    checkpoint_path = Path(checkpoint_path)
    file = read_octic(checkpoint_path)
    state_dict, keywords = translate(file.tensors, model_name)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in file.tensors.values()} - {"float32"})
    provenance = {
        "model": model_name,
        "source": SOURCE,
        "source_file": checkpoint_path.name,
        "source_sha256": _sha256(checkpoint_path),
        TENSORS_SHA256: hash_tensors(state_dict),
        "invariants": invariants_of(file.tensors) or "none: a hybrid, NOT invariant",
        **({"taken_from": f"its entry {file.wrapper!r}"} if file.wrapper else {}),
        **({"dropped": f"{len(file.dropped)} entries of heads of the training"} if file.dropped else {}),
        **({"converted_dtypes": f"{', '.join(dtypes)} to float32"} if dtypes else {}),
        **{name: version(name) for name in ("equivision-timm", "timm", "torch", "safetensors")},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    folder = write_model_folder(out_folder, model_name, state_dict, provenance, keywords)
    return Report(folder, provenance)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
