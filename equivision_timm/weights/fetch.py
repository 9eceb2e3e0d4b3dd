"""Download a released checkpoint from Google Drive, convert it and put it into the local weights folder.

The download lies in `<weights folder>/downloads`, where a broken one waits to be continued and a whole one to be
converted; the model's own folder appears only once everything is in it. A file lock makes a second process wait for
the first instead of downloading twice.
"""

from pathlib import Path

from filelock import FileLock

from equivision_timm.files import check_writable, file_sha256
from equivision_timm.models.pretrained import WEIGHTS_FILE, local_folder, weights_folder
from equivision_timm.weights.folder import check_model_folder
from equivision_timm.weights.rooms import check_file, check_options, convert_file, released

__all__ = ["fetch"]


def fetch(model_name: str, images: Path | None = None, signs: str | None = None) -> Path:
    """Have the weights of `model_name` in the local weights folder; prints what it does.

    Args:
        model_name: a model whose checkpoint was released, e.g. 'c8resnet50'.
        images: folder of photographs, on which the signs of a D4 or D8 checkpoint are found.
        signs: the sign pattern, where it is known.

    Returns:
        The model's folder; `timm.create_model` takes it as `local-dir:`, too.

    Raises:
        InputError: the weights folder cannot be written, there are no photographs in `images`.
        ValueError: no checkpoint of this model was released, or it has no such signs; the file is no such checkpoint,
            or another one than was released.
        ConnectionError: Google Drive did not give the file.
        ModuleNotFoundError: gdown is not installed.
    """
    if model_name not in released():
        raise ValueError(f"no weights of {model_name} were ever released; there are: {', '.join(released())}")
    check_options(model_name, images, signs)
    folder = local_folder(model_name)
    checkpoint = weights_folder() / "downloads" / f"{model_name}.ckpt"
    check_writable(checkpoint, make_folders=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(checkpoint.with_suffix(".lock")):
        if (folder / WEIGHTS_FILE).is_file():
            print(f"{model_name}: already in {folder}")
            return folder
        check_model_folder(folder, model_name)
        if not checkpoint.exists():
            _download(model_name, checkpoint)
        _check_kind(model_name, checkpoint)
        _check_hash(model_name, checkpoint, folder)
        try:
            print(convert_file(checkpoint, model_name, folder, images=images, signs=signs))
        except ValueError as error:
            raise ValueError(f"{error} (the download is kept in {checkpoint})") from error
        checkpoint.unlink()
    return folder


def _download(model_name: str, checkpoint: Path) -> None:
    """Download to `checkpoint`, going on where an earlier try broke off; gdown shows the progress."""
    try:
        import gdown
        import requests
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, but fetch needs it: pip install 'equivision-timm[fetch]'"
        ) from error
    drive_id = released()[model_name].drive_id
    try:
        # Without cookies, which gdown would write into the home folder
        gdown.download(id=drive_id, output=str(checkpoint), resume=True, retries=3, timeout=60, use_cookies=False)
    except (gdown.exceptions.DownloadError, requests.RequestException) as error:
        raise ConnectionError(
            f"Google Drive did not give the checkpoint of {model_name} (id {drive_id}): {error}\n"
            f"The same command goes on where the download stopped; delete {checkpoint.parent} to start afresh. "
            f"Or download https://drive.google.com/uc?id={drive_id} in a browser and save it as {checkpoint}"
        ) from error


def _check_kind(model_name: str, checkpoint: Path) -> None:
    """Delete what is no sound checkpoint, such as a download continued after the file on Drive had changed."""
    try:
        check_file(checkpoint, model_name)
    except ValueError as error:
        checkpoint.unlink()
        raise ValueError(f"Google Drive gave something else than a sound checkpoint, deleted again: {error}") from error


def _check_hash(model_name: str, checkpoint: Path, folder: Path) -> None:
    """Print the hash; delete a file that is another one than was released."""
    sha256, entry = file_sha256(checkpoint), released()[model_name]
    if not sha256.startswith(entry.sha256 or ""):
        checkpoint.unlink()
        raise ValueError(
            f"Google Drive gave another checkpoint of {model_name} than was released, deleted again: its sha256 "
            f"is {sha256}, not {entry.sha256}. If you trust it, download "
            f"https://drive.google.com/uc?id={entry.drive_id} in a browser and run "
            f"`python -m equivision_timm convert FILE --model {model_name} --out {folder}`"
        )
    print(f"{model_name}: sha256 {sha256} ({'as published' if entry.sha256 else 'none was published to compare with'})")
