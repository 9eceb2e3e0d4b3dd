"""Import, training and inference where what POSIX, Linux and GNU OpenMP have is missing: macOS and Windows, as if."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys, types
# What other packages ask for, they ask for before it goes
import filelock, huggingface_hub, matplotlib.figure, timm, timm.data, torch, torchvision, tqdm

system, folder = sys.argv[1:]
MISSING = {"register_at_fork", "fork", "geteuid", "getuid", "memfd_create", "sysconf", "sched_getaffinity", "mkfifo"}

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it fails


class System(types.ModuleType):
    name = {"windows": "nt", "macos": "posix"}[system]

    def __getattr__(self, name):
        if name in MISSING:
            raise AttributeError(name)
        return getattr(os, name)


class Library(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name is None and system == "windows":
            raise TypeError("bad argument type for built-in operation")
        self.nothing = name is None
        super().__init__(name, *args, **kwargs)

    def __getattr__(self, name):
        if self.nothing:  # no GNU OpenMP
            raise AttributeError(name)
        return super().__getattr__(name)


kept = {name: getattr(os, name) for name in MISSING if hasattr(os, name)}
for name in kept:
    delattr(os, name)  # while we are imported
import equivision_timm
from equivision_timm.cli.main import main
from equivision_timm.weights.folder import write_model_folder
from equivision_timm.layers.strategies import native_library

for name, value in kept.items():
    setattr(os, name, value)  # for the others again
ours = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "equivision_timm"]
for module in ours:
    if hasattr(module, "os"):
        module.os = System("os")
ctypes.CDLL = Library

assert "GNU OpenMP" in native_library.why_not()
model, x = timm.create_model("test_c8resnet", pretrained=True), torch.rand(2, 3, 33, 33)
model.eval()
expanded = timm.create_model("test_c8resnet", pretrained=True, conv_strategy="expand").eval()
with torch.no_grad():
    torch.testing.assert_close(model(x), expanded(x), rtol=1e-4, atol=1e-4)
model.train()(x).sum().backward()
write_model_folder(folder, "test_c8resnet", expanded.state_dict(), {})
assert main(["verify", folder + "/nowhere"]) == 1
"""


@pytest.mark.parametrize("system", ["macos", "windows"])
def test_other_systems(system, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script, system, tmp_path / "model"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
