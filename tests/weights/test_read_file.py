"""Reading checkpoint files: every form that occurs; a clear error for everything else; thousands of damaged files."""

import io
import os
import pickle
import random
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from support.reference_data import checkpoint

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.weights.equivision.convert import convert_original
from equivision_timm.weights.read_file import read_checkpoint

NAME = "d8resnet18_fast"  # the smallest


@pytest.fixture(scope="module")
def state():
    return checkpoint(NAME)


def small_state():
    """A tiny state dict for what needs no network."""
    return {"conv1.weights": torch.arange(6.0), "bn1.batch_norm_[8].num_batches_tracked": torch.tensor(3)}


def endless():
    """A nest of 200 levels, each twice the one below: small in memory and in a file, without end when printed."""
    value = 0
    for _ in range(200):
        value = [value, value]
    return value


def nested(levels, times):
    """Operations of a pickle that leave a tuple on the stack, `times` the same tuple in it, `levels` deep."""
    put, get, make = b"q\0", b"h\0", {1: b"\x85", 2: b"\x86"}[times]
    return b")" + levels * (put + (times - 1) * get + make)


TEXT = b"X\1\0\0\0a"
ENDLESS = {
    "key": b"}" + nested(200, 2) + b"K\1s.",
    "key deep in it": b"}" + TEXT + b"}" + nested(200, 2) + b"K\1ss.",
    "key of an OrderedDict": b"ccollections\nOrderedDict\n]]" + nested(200, 2) + b"aK\1aa\x85R.",
    "key of a Counter": b"ccollections\nCounter\n]" + nested(200, 2) + b"a\x85R.",
    "kind of a storage": nested(200, 2) + b"K\1K\1K\1(" + nested(200, 2) + b"tQ.",
    "deep key": b"}" + nested(20_000, 1) + b"K\1s.",
    "many operations": 10**6 * b"N" + b".",
    "list filled from the top": b"]q\0" + b"]q\1h\1h\1\x86q\2" + b"h\0h\2ah\0h\0ah\1h\2a.",
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", ENDLESS.values(), ids=ENDLESS)
def test_objects_without_end_are_refused(tmp_path, content, legacy):
    path = write_pickle(tmp_path / "x.ckpt", b"\x80\2" + content, legacy)
    with pytest.raises(ValueError, match=r"is no checkpoint: .*(more than 1000000|part of itself)") as raised:
        read_checkpoint(path)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_in_two_places_are_read(tmp_path, legacy):
    """Control: sixteen levels of the same, which is less than a million objects."""
    path = write_pickle(tmp_path / "x.ckpt", b"\x80\2}" + nested(16, 2) + b"K\1s.", legacy)
    with pytest.raises(ValueError, match="name is a tuple"):
        read_checkpoint(path)


def write_pickle(path, content, legacy):
    """A file of torch.save whose object has the pickle `content`."""
    if legacy:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        before = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system))
        path.write_bytes(before + content + pickle.dumps([], 2))
        return path
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in files.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)
    return path


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.0.9", "optimizer_states": [{"state": {0: torch.ones(2)}}]}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {**LIGHTNING, "state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "state_dict", "lightning", "ddp", "lightning and ddp"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_forms_that_occur(tmp_path, wrap, legacy):
    path = tmp_path / "x.ckpt"
    torch.save(wrap(small_state()), path, _use_new_zipfile_serialization=not legacy)
    assert same(read_checkpoint(path), small_state())


def test_safetensors_symlinks_and_dtypes(tmp_path):
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in small_state().items()}
    save_file(tensors, tmp_path / "x.bin")
    (tmp_path / "link").symlink_to(tmp_path / "x.bin")
    found = read_checkpoint(tmp_path / "link")
    assert found["conv1.weights"].dtype == torch.float16
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


class Harmful:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, legacy):
    path, proof = tmp_path / "x.ckpt", tmp_path / "proof"
    torch.save({**small_state(), "hyper_parameters": Harmful(proof)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="can run code"):
        read_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # negative control: it would have been run
    assert proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>", "a web page"),
        (b"hello, this is text", "something that begins with"),
        (b"\x80\x02" + b"}q\x00.", "holds an empty state dict|damaged|code"),
        (pickle.dumps({"a": 1}, 2), "damaged|code|no checkpoint"),
        (b"PK\x03\x04" + bytes(50), "damaged archive"),
        ((40).to_bytes(8, "little") + b'{"a": 1}' + bytes(60), "damaged safetensors"),
    ],
)
def test_other_files(tmp_path, content, message):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "empty"),
        ({"state_dict": {}}, "empty"),
        ({3: torch.ones(1)}, "name is a int, not a string"),
        ({("a", 1): torch.ones(1)}, "name is a tuple"),
        ({"a": {("a", 1): torch.ones(1)}}, "'a' is a dict"),
        ({"a": endless()}, r"the objects in it, written out, are more than 100000000"),
        ({"a" * 10**6: 3}, "entry 'a{100}' is a int"),
        ({"a": torch.ones(3, device="meta")}, "'a' is on the device meta and holds no values"),
        ({"a": torch.ones(3, dtype=torch.complex64)}, "'a' is of type complex64"),
        ({"a": torch.ones(3).to(torch.float8_e4m3fn)}, "'a' is of type float8_e4m3fn"),
        ({"a": torch.ones(3).to(torch.float8_e8m0fnu)}, "'a' is of type float8_e8m0fnu"),
        ({"a": torch.ones(3).to(torch.uint16)}, "'a' is of type uint16"),
        ({"a": "text"}, "'a' is a str"),
        ({"a": {"b": torch.ones(1)}}, "'a' is a dict"),
        ({"a": torch.ones(3).to_sparse()}, "not a dense tensor"),
        ({"a": torch.ones(1).expand(10**9)}, "claims shape"),
        ({"a": torch.tensor([1.0, float("nan")])}, "'a' holds NaN"),
        ({"a": torch.tensor([float("inf")])}, "'a' holds NaN or infinity"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "two entries for a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning")
def test_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(tmp_path, monkeypatch):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"a": nested})  # such files are refused by torch.load itself
    with pytest.raises(ValueError, match=r"'a' is a nested Tensor, not a dense tensor"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("bomb", ["deflated", "overlapping"])
def test_archives_that_unpack_to_more_than_they_are(tmp_path, bomb):
    torch.save({"conv1.weights": torch.zeros(10**7)}, tmp_path / "plain.ckpt")
    assert len(read_checkpoint(tmp_path / "plain.ckpt")) == 1
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain, zipfile.ZipFile(path, "w") as archive:
        for entry in plain.infolist():
            kind = zipfile.ZIP_DEFLATED if bomb == "deflated" else zipfile.ZIP_STORED
            archive.writestr(entry.filename, plain.read(entry), kind)
        if bomb == "overlapping":
            archive.filelist += [archive.filelist[-1]] * 3
            largest = max(archive.filelist, key=lambda entry: entry.file_size)
            archive.filelist += [largest] * 3
    assert path.stat().st_size < (10**5 if bomb == "deflated" else 5 * 10**7)
    with pytest.raises(ValueError, match=r"compressed archive.* unpacks to \d+ bytes: save"):
        read_checkpoint(path)


def test_no_file_folder_and_pipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_checkpoint(tmp_path / "missing.ckpt")
    (tmp_path / "broken").symlink_to(tmp_path / "missing.ckpt")
    with pytest.raises(FileNotFoundError, match="broken"):
        read_checkpoint(tmp_path / "broken")
    with pytest.raises(ValueError, match="is a folder"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="device or pipe"):  # and does not wait for it
        read_checkpoint(tmp_path / "pipe")
    with (tmp_path / "huge.ckpt").open("wb") as file:
        file.truncate(9 << 30)  # sparse
    with pytest.raises(ValueError, match=f"{9 << 30} bytes"):
        read_checkpoint(tmp_path / "huge.ckpt")


def mutations(content, count, seed):
    """Damaged copies: bits flipped, bytes overwritten, cut off, cut out, repeated, half in the parts with structure."""
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(content)) if content[:2] == b"PK" else io.BytesIO() as archive:
        starts = [entry.header_offset for entry in archive.infolist()] if content[:2] == b"PK" else [0]
    for _ in range(count):
        copy = bytearray(content)
        near = rng.choice([*starts, len(copy) - 1500]) + rng.randrange(1500)
        position = near % len(copy) if rng.random() < 0.5 else rng.randrange(len(copy))
        kind = rng.randrange(5)
        if kind == 0:
            copy[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            copy[position : position + 8] = rng.randbytes(8)
        elif kind == 2:
            del copy[position:]
        elif kind == 3:
            del copy[position : position + rng.randrange(1, 64)]
        else:
            copy[position:position] = copy[position : position + 64]
        yield bytes(copy)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_files(tmp_path, form):
    """A thousand of each form: a clean error, or tensors; the very same ones from a zip archive: it has checksums."""
    model = timm.create_model("test_d4resnet")  # names do not matter to the reader, size does to the test
    state = {key: value[:8] if value.ndim else value for key, value in list(model.state_dict().items())[:40]}
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=form == "zip")
    content = save({k: v.contiguous() for k, v in state.items()}) if form == "safetensors" else buffer.getvalue()
    path, refused, read = tmp_path / "x.ckpt", 0, 0
    for copy in mutations(content, 1000, seed=0):
        path.write_bytes(copy)
        try:
            found = read_checkpoint(path)
        except ValueError:  # anything else is a failure
            refused += 1
        else:
            read += 1
            if form == "zip":
                assert same(found, state)
            assert all(isinstance(value, torch.Tensor) and value.isfinite().all() for value in found.values())
    assert refused > 500
    assert read > 0


def test_damaged_state_dicts(state):
    """Names and shapes: every change is refused, and what is equivalent is converted to the same."""
    rng = random.Random(0)
    names, expected = list(state), convert_original(state, NAME)
    for _ in range(300):
        damaged, name = dict(state), rng.choice(names)
        value = damaged.pop(name)
        kind = rng.randrange(5)
        if kind == 1:
            damaged[name + rng.choice(["x", ".weight", " "])] = value
        elif kind == 2:
            damaged[name] = torch.cat([value.flatten(), value.flatten()[:1]])
        elif kind == 3:
            damaged[name] = value.unsqueeze(0)
        elif kind == 4:
            other = rng.choice([n for n in names if state[n].shape != value.shape])
            damaged[name] = state[other]
        with pytest.raises(ValueError, match=r"no checkpoint of|has shape"):
            convert_original(damaged, NAME)
    shuffled = rng.sample(names, len(names))
    again = convert_original({name: state[name] for name in shuffled}, NAME)
    assert same(again, expected)
