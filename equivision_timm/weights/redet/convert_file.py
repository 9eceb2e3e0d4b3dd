"""A checkpoint file of ReDet or mmrotate -> a model folder of ours, and a report."""

from pathlib import Path

from equivision_timm.files import file_sha256
from equivision_timm.kernel_basis import bases_sha256
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.weights.folder import Report, check_model_folder, versions, write_model_folder
from equivision_timm.weights.read_file import read_checkpoint
from equivision_timm.weights.redet.translate import translate
from equivision_timm.weights.released import find_released

__all__ = ["convert_file"]


def convert_file(checkpoint_path: str | Path, model_name: str, out_folder: str | Path) -> Report:
    """Convert a checkpoint file into `model.safetensors` and `config.json`; nothing is written unless all went well.

    The backbone of a detector has no classifier: the model folder then holds a model with `num_classes=0`.

    Args:
        checkpoint_path: a file of ReDet or mmrotate.
        model_name: 'c8reresnet50' or 'c8reresnet101'.
        out_folder: the folder to write.

    Raises:
        InputError: `out_folder` cannot be written or holds something else.
        ValueError: no checkpoint, one of another model, or a model that ReDet has no weights of.
        OSError: a file cannot be read or written.
    """
    released = find_released("redet", model_name)
    check_model_folder(out_folder, model_name)
    checkpoint_path = Path(checkpoint_path)
    tensors = read_checkpoint(checkpoint_path)
    found = translate(tensors, model_name)
    provenance = {
        "model": model_name,
        "source": released.source,
        "source_file": checkpoint_path.name,
        "source_sha256": file_sha256(checkpoint_path),
        TENSORS_SHA256: hash_tensors(found.state_dict),
        "basis_sha256": bases_sha256(found.kernels),
        "basis_from": "sampled_basis",
        "basis_residual": f"{found.residual:.1e}",
        "classifier": "of all channels: NOT invariant" if found.has_classifier else "none: the backbone of a detector",
        **({"dropped": f"{len(found.dropped)} entries of the detector"} if found.dropped else {}),
        **versions(),
    }
    arguments = None if found.has_classifier else {"num_classes": 0}
    folder = write_model_folder(out_folder, model_name, found.state_dict, provenance, arguments)
    return Report(folder, provenance)
