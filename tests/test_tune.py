"""`tune` with a false clock: the choice, its margins and vetoes, the table, bad input, several ranks."""

import json
from functools import partial

import pytest
import timm
import torch
import torch.multiprocessing as mp
from support.ranks import tune_in_group

import equivision_timm  # noqa: F401  registers the models
from equivision_timm.cli import tune as tune_module
from equivision_timm.cli.main import main
from equivision_timm.cli.tune import Setting, measure
from equivision_timm.errors import InputError
from equivision_timm.kernels import Kernel
from equivision_timm.layers import SteerableConv2d
from equivision_timm.layers.strategies import STRATEGIES, Layer, auto, measured
from equivision_timm.layers.strategies.contract import register
from equivision_timm.layers.strategies.expand import Expand

CPU = torch.device("cpu")
SETTING = Setting(batch_size=2, size=(33, 33))


class Twin(Expand):
    """The definition by another name; the clocks of these tests say how fast it is."""

    name = "twin"

    def estimate(self, layer, shape):
        return 1e6


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """A cache folder of its own, and a strategy more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured._choices.cache_clear()
    register(Twin)
    yield tmp_path
    del STRATEGIES["twin"]
    measured._choices.cache_clear()


@pytest.mark.parametrize("cache_home", [None, f"/{'x' * 5000}"], ids=["no home", "too long"])
def test_auto_needs_no_cache_folder(monkeypatch, cache_home):
    """No home folder, or one that cannot be looked into: nothing was tuned, and a model runs all the same."""
    if cache_home is None:  # a user that the system does not know
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    assert measured.measured_choice(Layer(Kernel("c4", 3), 2, 2), (1, 8, 9, 9), training=False) is None
    with pytest.raises(OSError, match=r"this user has no home folder|File name too long"):
        measured._folder().stat()


class Clock:
    """Seconds by strategy, in place of `tune._seconds`; a whole model takes the mean of its layers, times `whole`."""

    def __init__(self, model, monkeypatch, whole=None, **seconds):
        self.seconds = {"expand": 1.0, "block_diagonal": 3.0, "native": 2.0, "twin": 2.0, **seconds}
        self.whole, self.model, self.calls = whole or {}, model, 0
        monkeypatch.setattr(tune_module, "_seconds", self)

    def __call__(self, run, device):
        self.calls += 1
        run()
        names = [cell.cell_contents for cell in run.__closure__ or () if isinstance(cell.cell_contents, str)]
        if run.__defaults__:  # a layer: the strategy is bound to the call
            return self.seconds[run.__defaults__[0]]
        assert not names
        layers = [m.strategy for m in self.model.modules() if isinstance(m, SteerableConv2d)]
        used = [name for name in layers if name != "auto"]
        form = used[0] if len(set(used)) == 1 else "mixed"
        return self.whole.get(form, sum(map(self.seconds.get, used)) / len(used))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_c8resnet").eval()


def table(place):
    (file,) = (place / "equivision_timm" / "tune").glob("*.json")
    return json.loads(file.read_text())


def test_the_fastest_is_chosen_kept_and_found_by_auto(model, monkeypatch, place):
    Clock(model, monkeypatch, twin=0.5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(model, SETTING)
    assert found.won
    assert set(found.choice.values()) == {"twin"}
    assert set(model.conv_strategies(33, 2).values()) >= {"twin"}  # by auto, which finds the table
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(m.strategy == "auto" for m in model.modules() if isinstance(m, SteerableConv2d))
    layer, shape = model.layer1[0].conv1.conv, (2, 32, 9, 9)
    assert layer.strategy_for(shape, CPU) == "twin"
    # controls: another batch, another type, more threads, training
    assert layer.strategy_for((3, *shape[1:]), CPU) != "twin"
    assert layer.strategy_for(shape, CPU, torch.float64) != "twin"
    assert auto.choose(layer.describe(CPU, torch.float32), shape, True) != "twin"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert layer.strategy_for(shape, CPU) != "twin"
    torch.set_num_threads(threads)
    assert layer.strategy_for(shape, CPU) == "twin"
    assert table(place)["conditions"] == measured.conditions(CPU)


def test_what_runs_is_what_was_chosen(model, monkeypatch):
    Clock(model, monkeypatch, twin=0.5)
    with torch.no_grad():
        x = torch.rand(2, 3, 33, 33)
        expected = model(x)
        measure(model, SETTING)
        calls = []
        infer = Twin.infer
        monkeypatch.setattr(Twin, "infer", lambda self, *a, **k: calls.append(1) or infer(self, *a, **k))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == len([m for m in model.modules() if isinstance(m, SteerableConv2d)]) - 1  # not the stem


@pytest.mark.parametrize(("seconds", "chosen"), [(0.94, True), (0.97, False)])
def test_a_layer_must_win_by_five_per_cent(model, monkeypatch, seconds, chosen):
    monkeypatch.setattr(auto, "estimated", lambda *_: "expand")
    Clock(model, monkeypatch, twin=seconds)
    assert ("twin" in measure(model, SETTING).choice.values()) is chosen


@pytest.mark.parametrize("whole", [{"twin": 0.99}, {"twin": 1.5}, {"twin": 0.9, "native": 0.91}])
def test_the_whole_model_must_win_by_two_per_cent(model, monkeypatch, place, whole):
    """Against 'auto' and against the definition, which are the same here but for the last case."""
    estimate = "native" if "native" in whole else "expand"
    for_regular = {"regular": estimate, "trivial": "expand"}
    monkeypatch.setattr(auto, "estimated", lambda layer, shape: for_regular[layer.kernel.input_type])
    Clock(model, monkeypatch, whole={"expand": 1.0, **whole}, twin=0.5)
    found = measure(model, SETTING)
    assert not found.won
    assert set(found.choice.values()) == {estimate}
    assert not any(entry["won"] for entry in table(place)["models"].values())
    assert model.layer1[0].conv1.conv.strategy_for((2, 32, 9, 9), CPU) != "twin"


def test_wrong_numbers_are_out_however_fast(model, monkeypatch):
    infer = Twin.infer
    monkeypatch.setattr(Twin, "infer", lambda self, *a, **k: infer(self, *a, **k) * 1.01)
    Clock(model, monkeypatch, twin=0.01)
    found = measure(model, SETTING)
    assert all(row["twin"] is None for row in found.layers.values())
    assert "twin" not in found.choice.values()
    assert "wrong numbers" in tune_module.as_table(found)


def test_training_compares_gradients_and_keeps_statistics(model, monkeypatch, place):
    conv2d = Twin.conv2d
    monkeypatch.setattr(Twin, "conv2d", lambda self, x, w, layer: conv2d(self, x, w.detach() + 0 * w, layer))
    Clock(model, monkeypatch, twin=0.01)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    own = torch.ones_like(model.fc.bias)
    model.fc.bias.grad = own
    found = measure(model, Setting(2, (33, 33), train=True))
    assert model.fc.bias.grad is own
    assert torch.equal(own, torch.ones_like(own))
    model.fc.bias.grad = None
    assert all(row["twin"] is None for row in found.layers.values())  # a wrong gradient
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert all(key.endswith("train") for key in table(place)["layers"])


def test_settings_reach_the_layers(model, monkeypatch, place):
    Clock(model, monkeypatch)
    measure(model.to(memory_format=torch.channels_last), Setting(2, (33, 65), amp="bfloat16", channels_last=True))
    keys = list(table(place)["layers"])
    assert all("bfloat16" in key for key in keys)
    assert any("2x32x9x17" in key for key in keys)


def test_named_strategies_stay(model, monkeypatch):
    Clock(model, monkeypatch, twin=0.5)
    model.set_conv_strategy({"layer1.0.conv1.conv": "block_diagonal"})
    choice = measure(model, SETTING).choice
    assert "layer1.0.conv1.conv" not in choice
    assert model.layer1[0].conv1.conv.strategy == "block_diagonal"
    model.set_conv_strategy("expand")
    with pytest.raises(InputError, match="no convolution of this model has the strategy 'auto'"):
        measure(model, SETTING)


def test_interrupted_and_continued(model, monkeypatch, place):
    clock = Clock(model, monkeypatch, twin=0.5)
    whole = measure(model, SETTING)
    for file in (place / "equivision_timm" / "tune").iterdir():
        file.unlink()
    enough = clock.calls // 3

    def interrupting(run, device):
        if clock.calls >= enough:
            raise KeyboardInterrupt
        return clock(run, device)

    clock.calls = 0
    monkeypatch.setattr(tune_module, "_seconds", interrupting)
    assert main(["tune", "test_c8resnet", "--size", "33", "--batch-size", "2"]) == 130
    kept = table(place)
    assert 0 < len(kept["layers"]) < len(set(map(str, whole.layers)))
    assert not kept["models"]
    clock.calls = 0
    monkeypatch.setattr(tune_module, "_seconds", clock)
    assert measure(model, SETTING).choice == whole.choice
    assert clock.calls < 3 * enough  # what was there was not measured again


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"conditions": 1, "layers": {}, "models": {}}', "\x00"])
def test_a_damaged_table_is_ignored_with_one_line(model, monkeypatch, place, content):
    Clock(model, monkeypatch, twin=0.5)
    measure(model, SETTING)
    (file,) = (place / "equivision_timm" / "tune").glob("*.json")
    file.write_text(content)
    measured._choices.cache_clear()
    layer = model.layer1[0].conv1.conv
    with pytest.warns(RuntimeWarning, match=r"is ignored .*: run `tune` again"):
        chosen = layer.strategy_for((2, 32, 9, 9), CPU)
    assert chosen != "twin"
    assert layer.strategy_for((2, 32, 9, 9), CPU) == chosen  # without another warning, which would be an error


def test_names_in_the_table_that_do_not_exist_here(model, monkeypatch, place):
    Clock(model, monkeypatch, twin=0.5)
    measure(model, SETTING)
    layer = model.layer1[0].conv1.conv
    assert layer.strategy_for((2, 32, 9, 9), CPU) == "twin"
    monkeypatch.setattr(Twin, "supports", lambda self, layer: "not here")
    assert layer.strategy_for((2, 32, 9, 9), CPU) != "twin"


def test_no_memory(model, monkeypatch):
    def full(run, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune_module, "_seconds", full)
    with pytest.raises(InputError, match="no memory for --batch-size 2: lower it"):
        measure(model, SETTING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_c8rsnet"], "did you mean 'test_c8resnet'"),
        (["test_d4vit"], "no steerable convolutions"),
        (["test_c8resnet", "--size", "3"], "too small"),
        (["test_c8resnet", "--batch-size", "0"], "--batch-size 0 is not possible"),
        (["test_c8resnet", "--device", "cudo"], "--device cudo cannot be used"),
    ],
)
def test_bad_input(arguments, message, capsys, place):
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((place / "equivision_timm").rglob("*.json")) if (place / "equivision_timm").exists() else True


def test_a_mapping_with_unknown_layers(model):
    with pytest.raises(ValueError, match="names 'layer9', which is no convolution of this model"):
        model.set_conv_strategy({"layer9": "expand"})


def test_the_command(monkeypatch, capsys, place):
    assert main(["tune", "test_c8resnet", "--size", "33", "-b", "1"]) == 0
    printed = capsys.readouterr().out
    assert "layer4.0.conv2.conv" in printed
    assert "kept in" in printed
    assert table(place)["layers"]


def test_all_ranks_take_what_the_first_measured(tmp_path):
    mp.spawn(tune_in_group, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tuned_compiled", [False, True])
def test_compiled_models_go_by_what_was_measured_compiled(tuned_compiled, dynamic, model, monkeypatch, place):
    """Each way to run a model has its own choices; a graph that leaves the batch open goes by the estimates."""
    compile_model = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(tune_module.torch, "compile", compile_model)
    Clock(model, monkeypatch, twin=0.5)
    torch.compiler.reset()
    assert measure(model, Setting(batch_size=2, size=(33, 33), compiled=tuned_compiled)).won
    (name,) = table(place)["models"]
    assert name.endswith(", compiled") == tuned_compiled

    calls = []
    infer = Twin.infer
    monkeypatch.setattr(Twin, "infer", lambda self, *a, **k: calls.append(1) or infer(self, *a, **k))
    images = torch.rand(2, 3, 33, 33)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(images)
        assert bool(calls) == (not tuned_compiled)
        calls.clear()
        compiled = compile_model(model, dynamic=dynamic)
        assert torch.allclose(compiled(images), expected, atol=1e-5)
        assert bool(calls) == (tuned_compiled and not dynamic)
        calls.clear()
        compiled(torch.rand(3, 3, 33, 33))  # another size: nothing was measured
    assert not calls


def test_training_while_compiled_has_choices_of_its_own(model, monkeypatch, place):
    compile_model = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(tune_module.torch, "compile", compile_model)
    Clock(model, monkeypatch, twin=0.5)
    torch.compiler.reset()
    assert measure(model, Setting(batch_size=2, size=(33, 33), compiled=True, train=True)).won
    calls = []
    infer = Twin.infer
    monkeypatch.setattr(Twin, "infer", lambda self, *a, **k: calls.append(1) or infer(self, *a, **k))
    torch.compiler.reset()
    compiled, images = compile_model(model.train()), torch.rand(2, 3, 33, 33)
    with torch.no_grad():
        compiled(images)
    assert not calls
    compiled(images).sum().backward()
    assert calls
