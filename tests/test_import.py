"""Importing the package is light; import, training and inference work without POSIX, Linux and GNU OpenMP."""

import subprocess
import sys

SCRIPT = """
import ctypes, os, sys
# Dependencies need some of it when they are imported
import filelock, huggingface_hub, timm, timm.data, torch, torchvision, tqdm

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it fails
for name in ("register_at_fork", "fork", "geteuid", "getuid", "memfd_create", "sysconf", "sched_getaffinity", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)


class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if self._name is None:  # the process itself: no GNU OpenMP
            raise AttributeError(name)
        return super().__getattr__(name)


import equivision_timm
assert "equivision_timm.models.equivariant_resnet" in sys.modules
heavy = {"escnn", "matplotlib", "sklearn", "scipy", "skimage", "onnx", "gdown", "equivision_timm.cli"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from equivision_timm.cli.main import main
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.layers.strategies import native_library

ctypes.CDLL = Library
assert "GNU OpenMP" in native_library.why_not()
model, x = timm.create_model("test_c8resnet", pretrained=True), torch.rand(2, 3, 33, 33)
model.eval()
expanded = timm.create_model("test_c8resnet", pretrained=True, conv_strategy="expand").eval()
with torch.no_grad():
    torch.testing.assert_close(model(x), expanded(x), rtol=1e-4, atol=1e-4)
model.train()(x).sum().backward()
write_model_folder(sys.argv[1], "test_c8resnet", expanded.state_dict(), {})
assert main(["verify", sys.argv[1] + "/nowhere"]) == 1
"""


def test_another_system(tmp_path):
    run = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "model"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
