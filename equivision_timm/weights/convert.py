"""Conversion of a foreign checkpoint file into a model folder: read, translate, load strictly, write."""

from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from equivision_timm.data import find_photographs
from equivision_timm.errors import InputError
from equivision_timm.files import file_sha256
from equivision_timm.models.pretrained import TENSORS_SHA256, hash_tensors
from equivision_timm.weights import equivision, flopping, octic, redet
from equivision_timm.weights.checkpoint import Translation, read_checkpoint
from equivision_timm.weights.folder import check_model_folder, write_model_folder
from equivision_timm.weights.released import released
from equivision_timm.weights.signs import parse_signs

__all__ = ["check_options", "convert_file"]

_FORMATS = (equivision, redet, octic, flopping)


def convert_file(
    checkpoint: str | Path,
    model_name: str,
    folder: str | Path,
    images: str | Path | None = None,
    signs: str | None = None,
) -> dict[str, str]:
    """Convert a checkpoint of equivision, ReDet, octic-vits or flopping-for-flops, and write all or nothing.

    Args:
        checkpoint: file of `torch.save` or safetensors.
        images: photographs for checkpoints of equivision, by default those of scikit-image.
        signs: sign pattern of D4 and D8 checkpoints of equivision; None chooses among the known ones.

    Returns the provenance, as in the metadata of the safetensors file.

    Raises:
        InputError: an option does not apply to the model, or `folder` cannot be written.
        WeightsError: the file is damaged or does not fit the model, or the signs are not clear (`AmbiguousSigns`).
        RuntimeError: entries are left over or of another shape.
        OSError: the file cannot be read, or writing fails.
    """
    checkpoint, module = Path(checkpoint), check_options(model_name, images, signs)
    check_model_folder(folder, model_name)
    tensors = read_checkpoint(checkpoint)
    options = {"images": images, "signs": signs} if module is equivision else {}
    found: Translation = module.translate(tensors, model_name, **options)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()}
    provenance = {
        "model": model_name,
        **({"source": released()[model_name].source} if model_name in released() else {}),
        "source_file": checkpoint.name,
        "source_sha256": file_sha256(checkpoint),
        TENSORS_SHA256: hash_tensors(found.state_dict),
        "dtypes_of_file": ", ".join(sorted(dtypes)),
        **found.notes,
        **{name: version(name) for name in ("equivision-timm", "timm", "torch", "safetensors")},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_model_folder(folder, model_name, found.state_dict, provenance, found.keywords)
    return provenance


def check_options(model_name: str, images: str | Path | None, signs: str | None) -> ModuleType:
    """The translator of a model; raises InputError if there is none, or if options of `convert_file` do not apply."""
    module = next((module for module in _FORMATS if model_name in module.models()), None)
    if module is None or (module is not equivision and (images or signs)):
        remedy = "leave --images and --signs out" if module else "use a model such as c8resnet50"
        raise InputError(f"there are no such checkpoints of {model_name!r} to convert: {remedy}")
    if signs is not None:
        parse_signs(model_name.removeprefix("test_").partition("resnet")[0], signs)
    if images is not None:
        find_photographs(images)
    return module
