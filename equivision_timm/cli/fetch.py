"""The command `fetch`: released weights into the local weights folder.

A checkpoint is downloaded from Google Drive to `<weights folder>/downloads`, where a broken download is continued, and
converted. The folder of the model appears once everything is in it.
"""

import argparse
from pathlib import Path

from equivision_timm.cli.options import Parsers, add_command, add_names, add_options, aligned, for_each
from equivision_timm.files import file_sha256
from equivision_timm.models.pretrained import WEIGHTS_FILE, WeightsError, local_folder, weights_folder
from equivision_timm.weights.checkpoint import DamagedFile
from equivision_timm.weights.convert import check_options, convert_file
from equivision_timm.weights.folder import check_model_folder
from equivision_timm.weights.released import released

__all__ = ["fetch", "register"]


def register(commands: Parsers) -> None:
    text = "download released weights into the local weights folder"
    more = """Downloads checkpoints of equivision, ReDet and octic-vits from Google Drive, and converts them.
        The weights folder is $EQUIVISION_TIMM_WEIGHTS, by default equivision_timm in the user's cache folder;
        create_model(NAME, pretrained=True) loads from it. The same command continues a broken download."""
    parser = add_command(commands, "fetch", run, text, more)
    add_names(parser, "every model whose checkpoint was released")
    add_options(parser, "images", "signs")


def run(args: argparse.Namespace) -> int:
    """Fetch all models, even if one fails; returns the exit status."""
    return for_each(args.names or released(), lambda name: fetch(name, args.images, args.signs))


def fetch(model_name: str, images: Path | None = None, signs: str | None = None) -> None:
    """Put the weights of a model, e.g. 'c8resnet50', into the local weights folder, and print the progress.

    `images` and `signs` are as in `convert_file`; signs default to those in the table of released files.
    """
    entry, folder = released()[model_name], local_folder(model_name)
    check_options(model_name, images, signs)
    if (folder / WEIGHTS_FILE).is_file():
        print(f"{model_name}: already in {folder}")
        return
    check_model_folder(folder, model_name)
    checkpoint = weights_folder() / "downloads" / f"{model_name}.ckpt"
    if not checkpoint.exists():
        _download(model_name, entry.drive_id, checkpoint)
    sha256 = file_sha256(checkpoint)
    if not sha256.startswith(entry.sha256 or ""):
        checkpoint.unlink()
        raise WeightsError(
            f"Google Drive gave another checkpoint of {model_name} than was released, deleted again: its sha256 "
            f"is {sha256}, not {entry.sha256}. If you trust it, download "
            f"https://drive.google.com/uc?id={entry.drive_id} in a browser and run "
            f"`python -m equivision_timm convert FILE --model {model_name} --out {folder}`"
        )
    published = "as published" if entry.sha256 else "none was published to compare with"
    print(f"{model_name}: {checkpoint}, sha256 {sha256} ({published})")
    try:
        provenance = convert_file(checkpoint, model_name, folder, images, signs or entry.signs)
    except DamagedFile:  # for example continued after the file on Drive had changed
        checkpoint.unlink()
        raise
    checkpoint.unlink()
    print(aligned({"written": folder, **provenance}.items(), left=(0, 1)))


def _download(model_name: str, drive_id: str, checkpoint: Path) -> None:
    """Download to `checkpoint`, continuing a broken download; gdown shows the progress."""
    import gdown

    print(f"{model_name}: https://drive.google.com/uc?id={drive_id}, or download it in a browser as {checkpoint}")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # Without cookies, which gdown would write into the home folder
    gdown.download(id=drive_id, output=str(checkpoint), resume=True, retries=3, timeout=60, use_cookies=False)
