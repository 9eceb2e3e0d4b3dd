"""A checkpoint file of octic-vits -> a model folder of ours, and a report."""

from pathlib import Path

from equivision_timm.files import file_sha256
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import Report, check_model_folder, versions, write_model_folder
from equivision_timm.weights.octic.read_file import read_octic
from equivision_timm.weights.octic.translate import invariants_of, translate
from equivision_timm.weights.released import find_released

__all__ = ["convert_file"]


def convert_file(checkpoint_path: str | Path, model_name: str, out_folder: str | Path) -> Report:
    """Convert a checkpoint file into `model.safetensors` and `config.json`; nothing is written unless all went well.

    Args:
        checkpoint_path: file of octic-vits, see `read_octic`.
        model_name: the model, e.g. 'd4vit_large_patch16_224'.
        out_folder: the folder to write.

    Raises:
        InputError: `out_folder` cannot be written or holds something else.
        ValueError: not a checkpoint, one of another model, or a model that octic-vits has no weights of.
        OSError: a file cannot be read or written.
    """
    released = find_released("octic", model_name)
    check_model_folder(out_folder, model_name)
    checkpoint_path = Path(checkpoint_path)
    file = read_octic(checkpoint_path)
    state_dict, keywords = translate(file.tensors, model_name)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in file.tensors.values()} - {"float32"})
    provenance = {
        "model": model_name,
        "source": released.source,
        "source_file": checkpoint_path.name,
        "source_sha256": file_sha256(checkpoint_path),
        TENSORS_SHA256: hash_tensors(state_dict),
        "invariants": invariants_of(file.tensors) or "none: a hybrid, NOT invariant",
        **({"taken_from": f"its entry {file.wrapper!r}"} if file.wrapper else {}),
        **({"dropped": f"{len(file.dropped)} entries of heads of the training"} if file.dropped else {}),
        **({"converted_dtypes": f"{', '.join(dtypes)} to float32"} if dtypes else {}),
        **versions(),
    }
    folder = write_model_folder(out_folder, model_name, state_dict, provenance, keywords)
    return Report(folder, provenance)
