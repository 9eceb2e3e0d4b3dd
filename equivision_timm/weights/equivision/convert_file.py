"""A checkpoint file of the original -> a model folder of ours, and a report: what `convert` and `fetch` run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from equivision_timm.files import file_sha256
from equivision_timm.images.photographs import draw_crops, find_photographs, load_photographs
from equivision_timm.kernel_basis import bases_sha256
from equivision_timm.models import EquivariantResNet
from equivision_timm.models.tensor_hash import TENSORS_SHA256, hash_tensors
from equivision_timm.models.variants import create
from equivision_timm.weights.equivision.convert import convert_original, convert_with_details, fitting_models
from equivision_timm.weights.equivision.rivals import Statistics, check_before_search, check_statistics
from equivision_timm.weights.equivision.sign_groups import known_patterns, parse_signs, sign_groups
from equivision_timm.weights.equivision.signs import MOST_BATCHES, SignSearch, find_signs
from equivision_timm.weights.folder import check_model_folder, versions, write_model_folder
from equivision_timm.weights.read_file import read_checkpoint

__all__ = ["Report", "convert_file"]


@dataclass(frozen=True)
class Report:
    """What was converted and how.

    Attributes:
        folder: the model folder that was written.
        model_name: the model.
        source_sha256: hash of the checkpoint file.
        tensors_sha256: hash of the converted tensors, see `tensor_hash.py`.
        basis_sha256: hash of our kernel bases, in which the coefficients now are.
        basis: what fixed the coefficients: 'sampled_basis', 'filter', 'signs' or 'canonical', see `convert.py`.
        residual: largest relative residual of the change of basis.
        dtypes: types other than float32 in the file; everything is float32 now.
        signs: the sign pattern, None where there was none to choose.
        search: how the pattern was found, None where it was given.
        statistics: how well the batch-norm statistics fit; None where there were no photographs to tell.
    """

    folder: Path
    model_name: str
    source_sha256: str
    tensors_sha256: str
    basis_sha256: str
    basis: str
    residual: float
    dtypes: tuple[str, ...]
    signs: str | None
    search: SignSearch | None
    statistics: Statistics | None

    def __str__(self) -> str:
        rows = {"written": self.folder, **_provenance(self)}
        return "\n".join(f"{name:18} {value}" for name, value in rows.items())


def convert_file(
    checkpoint_path: str | Path,
    model_name: str,
    out_folder: str | Path,
    images: str | Path | None = None,
    signs: str | None = None,
) -> Report:
    """Convert a checkpoint file into `model.safetensors` and `config.json`; nothing is written unless all went well.

    Args:
        checkpoint_path: file of the original network, see `read_checkpoint`.
        model_name: the model, e.g. 'c8resnet50'.
        out_folder: the folder to write.
        images: folder of photographs, on which the batch-norm statistics are compared and the signs of a D_4 or D_8
            checkpoint found; None takes those of scikit-image.
        signs: the sign pattern, where it is known.

    Raises:
        InputError: `out_folder` cannot be written or holds something else, there are no photographs in `images`.
        ValueError: not a checkpoint, or one of another model, also where only its statistics say so
            (`check_statistics`); signs that cannot be told (`AmbiguousSigns`).
        OSError: a file cannot be read or written.
        ModuleNotFoundError: photographs are needed, none are named, and scikit-image is not installed.
    """
    check_model_folder(out_folder, model_name)
    if images is not None:
        find_photographs(images)
    checkpoint_path = Path(checkpoint_path)
    original = read_checkpoint(checkpoint_path)
    conversion = convert_with_details(original, model_name, signs)
    with torch.device("meta"):
        model = create(model_name, EquivariantResNet)
    has_basis = conversion.basis not in ("canonical", "signs")
    others = [] if has_basis else fitting_models(original, model_name)
    rivals = {other: convert_original(original, other) for other in others}
    to_find = conversion.basis == "canonical" and bool(sign_groups(model.group))
    photographs = _photographs(images, needed=to_find or bool(rivals))
    search, statistics = None, None
    if to_find:
        check_before_search(model_name, conversion.state_dict, rivals, draw_crops(photographs))
        search = _search(model_name, conversion.state_dict, photographs)
        conversion = convert_with_details(original, model_name, search.signs)
    if photographs:
        decided = signs is not None
        statistics = check_statistics(model_name, conversion.state_dict, rivals, draw_crops(photographs), decided)
    if search:
        signs = search.signs
    elif signs is not None:
        signs = parse_signs(model.group, signs)
    report = Report(
        folder=Path(out_folder),
        model_name=model_name,
        source_sha256=file_sha256(checkpoint_path),
        tensors_sha256=hash_tensors(conversion.state_dict),
        basis_sha256=bases_sha256(model.kernels()),
        basis=conversion.basis,
        residual=conversion.residual,
        dtypes=conversion.dtypes,
        signs=signs,
        search=search,
        statistics=statistics,
    )
    provenance = {"source_file": checkpoint_path.name, **_provenance(report), **versions()}
    write_model_folder(report.folder, model_name, conversion.state_dict, provenance)
    return report


def _photographs(images: str | Path | None, needed: bool) -> list[np.ndarray]:
    """The photographs; none where none are named, none installed, and the conversion can do without."""
    try:
        return load_photographs(images)
    except ModuleNotFoundError:
        if needed:
            raise
        return []


def _search(model_name: str, state_dict: dict[str, torch.Tensor], photographs: list[np.ndarray]) -> SignSearch:
    model = create(model_name, EquivariantResNet)
    model.load_state_dict(state_dict)
    more = (draw_crops(photographs, seed=seed) for seed in range(1, MOST_BATCHES))
    return find_signs(model, draw_crops(photographs), more=more)


def _provenance(report: Report) -> dict[str, str]:
    rows = {
        "model": report.model_name,
        "source_sha256": report.source_sha256,
        TENSORS_SHA256: report.tensors_sha256,
        "basis_sha256": report.basis_sha256,
        "basis_from": report.basis,
    }
    if report.residual:
        rows["basis_residual"] = f"{report.residual:.1e}"
    if report.dtypes:
        rows["converted_dtypes"] = f"{', '.join(report.dtypes)} to float32"
    if report.statistics:
        found = report.statistics
        rows["statistics"] = f"log variances off by {found.rms:.2g} on {found.crops} crops of photographs"
        rows |= {f"better_than_{other}": f"{lead:.1f} standard errors" for other, lead in found.leads.items()}
    else:
        rows["statistics"] = "not compared: no photographs (--images DIR)"
    if report.signs:
        patterns = known_patterns(report.model_name.removeprefix("test_").split("resnet")[0])
        names = [name for name, pattern in patterns.items() if pattern == report.signs]
        rows |= {"signs": report.signs, "signs_known_as": names[0] if names else "unknown"}
    if report.search:
        search = asdict(report.search)
        rows |= {
            "signs_misfit": f"{search['misfit']:.4g}",
            "runner_up": search["runner_up"],
            "runner_up_misfit": f"{search['runner_up_misfit']:.4g}",
            "separation": f"{search['separation']:.1f} standard errors",
            "compared_on": f"{search['crops']} crops",
            "logits_differ": f"{search['logits_differ']:.2g} standard deviations",
            "known_misfits": ", ".join(f"{name} {misfit:.4g}" for name, misfit in search["known"].items()),
        }
    elif report.signs:
        rows["signs_given"] = "by the user"
    return rows
