"""`tune` with a simulated clock: the choice, its margins and vetoes, the table, bad input."""

import copy
import json
from functools import partial

import pytest
import timm
import torch

import equivision_timm
from equivision_timm.cli.main import main
from equivision_timm.cli.tune import as_table
from equivision_timm.errors import InputError
from equivision_timm.kernels import Kernel
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto, measured
from equivision_timm.layers.strategies.contract import register
from equivision_timm.layers.strategies.expand import Expand
from equivision_timm.models import tune as tune_module
from equivision_timm.models.tune import Setting, measure

CPU = torch.device("cpu")
SETTING = Setting(batch_size=2, size=(33, 33))
SHAPE = (2, 32, 9, 9)  # of layer1.0.conv1 for these images
compile_model = partial(torch.compile, backend="eager", fullgraph=True)


class Twin(Expand):
    """The definition under another name; the clock says how fast it is."""

    name = "twin"


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """A cache folder of its own, and one more strategy."""

    def forget():
        measured.read_choices.cache_clear()
        auto.decide.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    register(Twin)
    forget()
    yield tmp_path
    del STRATEGIES["twin"]
    forget()


class Clock:
    """Seconds by strategy; a whole model takes the mean of its layers, by `whole` if given."""

    def __init__(self):
        self.seconds, self.whole = {"expand": 1.0, "block_diagonal": 3.0, "native": 2.0, "twin": 0.5}, {}
        self.now, self.timed, self.stop_after = 0.0, 0, None

    def deepcopy(self, model):
        copied = copy.deepcopy(model)
        self.layers = [m for m in copied.modules() if isinstance(m, SteerableConv2d) and m.strategy == "auto"]
        return copied

    def perf_counter(self):
        """Called before and after what is timed; a layer alone has a strategy while the others have 'auto'."""
        if self.timed == self.stop_after:
            raise KeyboardInterrupt
        self.timed += 1
        if self.timed % 2 == 0:
            names = [layer.strategy for layer in self.layers if layer.strategy != "auto"]
            seconds = self.seconds if len(names) == 1 else {**self.seconds, **self.whole}
            self.now += sum(seconds[name] for name in names) / len(names)
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune_module, "copy", clock)
    monkeypatch.setattr(tune_module, "time", clock)
    return clock


def count_twins(monkeypatch):
    """A list that gets one entry for each convolution of the strategy twin."""
    calls, conv2d = [], Twin.conv2d
    monkeypatch.setattr(Twin, "conv2d", lambda self, *args: calls.append(1) or conv2d(self, *args))
    return calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_c8resnet").eval()


def table(place):
    (file,) = (place / "equivision_timm" / "tune").glob("*.json")
    return json.loads(file.read_text())


def test_auto_needs_no_cache_folder(monkeypatch):
    """Of a user whom the system does not know."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    assert measured.measured_choice(Layer(Kernel("c4", 3), 2, 2), (1, 8, 9, 9), False, False, 1) is None


@pytest.mark.parametrize("train", [False, True])
def test_the_fastest_is_chosen_and_found_by_auto(model, clock, place, train, monkeypatch):
    """The model itself does not change, nor does what training changes: here one norm is frozen."""
    model.train()
    model.layer1.eval()
    own = model.fc.bias.grad = torch.ones_like(model.fc.bias)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = measure(model, Setting(2, (33, 33), train=train))
    assert ("twin" in model.conv_strategies(33, 2).values()) is not train  # these are the strategies of inference
    assert found.won
    assert set(found.choice.values()) == {"twin"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert model.fc.bias.grad is own
    assert torch.equal(own, torch.ones_like(own))
    assert all(m.strategy == "auto" for m in model.modules() if isinstance(m, SteerableConv2d))

    layer = model.layer1[0].conv1.conv.describe(CPU, torch.float32)
    assert auto.choose(layer, SHAPE, train) == "twin"
    assert auto.choose(layer, SHAPE, not train) != "twin"  # controls: the mode, batch, type, number of threads
    assert auto.choose(layer, (3, *SHAPE[1:]), train) != "twin"
    double = model.layer1[0].conv1.conv.describe(CPU, torch.float64)
    assert auto.choose(double, SHAPE, train) != "twin"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert auto.choose(layer, SHAPE, train) != "twin"
    torch.set_num_threads(threads)
    calls = count_twins(monkeypatch)
    with torch.set_grad_enabled(train):
        model.eval()(torch.rand(2, 3, 33, 33))
    assert len(calls) == len(found.choice)  # every convolution but the stem
    assert table(place)["conditions"] == measured.conditions(CPU)


@pytest.mark.parametrize(
    ("seconds", "whole", "won"),
    [
        (0.94, {}, True),  # a layer must win by 5 %
        (0.97, {}, False),
        (0.5, {"twin": 0.97}, True),  # and the whole model by 2 %
        (0.5, {"twin": 0.99}, False),
        (0.5, {"twin": 1.5}, False),
        (0.5, {"twin": 0.9, "native": 0.91}, False),  # also against the rule, if that is not the definition
    ],
)
def test_margins(model, clock, monkeypatch, place, seconds, whole, won):
    other = "native" if "native" in whole else "expand"
    monkeypatch.setattr(auto, "rule", lambda layer: {"regular": other}.get(layer.kernel.input_type, "expand"))
    clock.seconds["twin"], clock.whole = seconds, whole
    found = measure(model, SETTING)
    assert found.won is won
    assert set(found.choice.values()) == {"twin" if won else other}
    assert [entry["won"] for entry in table(place)["models"].values()] == [won]
    assert (model.layer1[0].conv1.conv.strategy_for(SHAPE, CPU) == "twin") is won


@pytest.mark.parametrize("train", [False, True])
def test_wrong_numbers_are_excluded(model, clock, monkeypatch, train):
    """In training also wrong gradients."""
    conv2d = Twin.conv2d
    wrong = {False: lambda y: y * 1.01, True: lambda y: y.detach() + 0 * y}[train]
    monkeypatch.setattr(Twin, "conv2d", lambda self, x, w, layer: wrong(conv2d(self, x, w, layer)))
    found = measure(model, Setting(2, (33, 33), train=train))
    assert all(row["twin"] is None for row in found.layers.values())
    assert "twin" not in found.choice.values()
    assert "wrong numbers" in as_table(found)


def test_settings_reach_the_layers_and_named_strategies_stay(model, clock, place):
    model.set_conv_strategy({"layer1.0.conv1.conv": "block_diagonal"})
    choice = measure(model, Setting(2, (33, 65), amp="bfloat16", channels_last=True)).choice
    assert all("bfloat16" in key for key in table(place)["layers"])
    assert any("2x32x9x17" in key for key in table(place)["layers"])
    assert "layer1.0.conv1.conv" not in choice
    assert equivision_timm.tune(model, 33, 2).keys() == choice.keys()
    strategies = {m.strategy for m in model.modules() if isinstance(m, SteerableConv2d)}
    assert strategies == {"auto", "block_diagonal", "twin"}  # auto: the stem
    model.set_conv_strategy("expand")
    with pytest.raises(InputError, match="auto"):
        measure(model, SETTING)


def test_the_command_interrupted_and_continued(model, clock, place, capsys):
    whole = measure(model, SETTING)
    for file in (place / "equivision_timm" / "tune").iterdir():
        file.unlink()
    clock.stop_after, clock.timed = clock.timed // 3, 0
    assert main(["tune", "test_c8resnet", "--size", "33", "--batch-size", "2"]) == 130
    assert 0 < len(table(place)["layers"]) < len(whole.layers)
    assert not table(place)["models"]
    enough, clock.stop_after, clock.timed = clock.stop_after, None, 0
    assert main(["tune", "test_c8resnet", "--size", "33", "--batch-size", "2"]) == 0
    assert "layer4.0.conv2.conv" in capsys.readouterr().out
    assert clock.timed < 3 * enough  # what was there was not measured again
    assert measure(model, SETTING).choice == whole.choice


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_models_have_choices_of_their_own(compiled, dynamic, model, clock, monkeypatch):
    """A graph that leaves the batch open follows the rule."""
    torch.compiler.reset()
    with monkeypatch.context() as patched:
        patched.setattr(tune_module.torch, "compile", compile_model)
        assert measure(model, Setting(2, (33, 33), compiled=compiled)).won
    torch.compiler.reset()
    images = torch.rand(2, 3, 33, 33)
    with torch.no_grad():
        calls = count_twins(monkeypatch)
        expected = model(images)
        assert bool(calls) == (not compiled)
        calls.clear()
        function = compile_model(model, dynamic=dynamic)
        torch.testing.assert_close(function(images), expected, rtol=1e-4, atol=1e-5)
        assert bool(calls) == (compiled and not dynamic)
        calls.clear()
        function(torch.rand(3, 3, 33, 33))  # nothing was measured for this size
    assert not calls
