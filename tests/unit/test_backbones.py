"""Backbones: shapes, layers, last shared layer, weights from files."""

import logging
import urllib.error
from pathlib import Path

import pytest
import torch
import yaml

from mtl_cli import backbones
from mtl_cli.backbones import ConvNeXt, MobileNetV3, ResNet, Tiny, ViT
from mtl_cli.errors import CheckpointError, ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf" / "backbone"
MAPS = ["pool", "c2", "c3", "c4", "c5"]
STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


@pytest.fixture(scope="module")
def networks():
    return {
        "tiny": Tiny(width=4, features=MAPS[:4]),
        "resnet18": ResNet("resnet18", features=MAPS),
        "mobilenet_v3_large": MobileNetV3("mobilenet_v3_large", features=MAPS),
        "convnext_tiny": ConvNeXt("convnext_tiny", features=MAPS),
        "vit_b_16": ViT("vit_b_16", image_size=32, features=["pool", "tokens"]),
    }


NAMES = ["tiny", "resnet18", "mobilenet_v3_large", "convnext_tiny", "vit_b_16"]


@pytest.mark.parametrize("name", NAMES)
def test_features_have_the_declared_channels_and_strides(networks, name):
    network, side = networks[name].eval(), 32 if name == "vit_b_16" else 64
    with torch.no_grad():
        features = network(torch.randn(2, 3, side, side))
    assert set(features) == set(network.channels)
    assert features["pool"].shape == (2, network.channels["pool"])
    for map_name, stride in STRIDES.items():
        if map_name in features:
            expected = (2, network.channels[map_name], side // stride, side // stride)
            assert features[map_name].shape == expected
    if "tokens" in features:
        assert features["tokens"].shape == (2, 4, 768)


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_lies_in_exactly_one_layer(networks, name):
    layers = networks[name].layers()
    assert layers[0][0] == "stem"
    for parameter, _ in networks[name].named_parameters():
        homes = [
            layer
            for layer, prefixes in layers
            if any(parameter == p or parameter.startswith(f"{p}.") for p in prefixes)
        ]
        assert len(homes) == 1, (parameter, homes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny", "blocks.3.0"),
        ("resnet18", "layer4.1.conv2"),
        ("mobilenet_v3_large", "features.16.0"),
        ("convnext_tiny", "features.7.2.block.5"),
        ("vit_b_16", "encoder.layers.encoder_layer_11.mlp.3"),
    ],
)
def test_last_shared_is_a_weight_matrix_of_the_last_layer(networks, name, expected):
    network = networks[name]
    assert network.last_shared() == expected
    assert network.get_submodule(expected).weight.ndim >= 2
    assert any(expected.startswith(f"{p}.") for p in network.layers()[-1][1])


def test_only_what_is_asked_for_is_returned():
    network = ResNet("resnet18", features=["c4"])
    assert network.channels == {"c4": 256}
    assert set(network(torch.randn(2, 3, 32, 32))) == {"c4"}


def test_equals_torchvision_on_the_same_weights():
    from torchvision import models

    reference = models.resnet18(weights=None).eval()
    own = ResNet("resnet18").eval()
    backbones._fill(own, reference.state_dict(), "reference")
    reference.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(own(images)["pool"], reference(images))


def test_vit_and_convnext_equal_torchvision(networks):
    images = torch.randn(2, 3, 32, 32)
    for name, head in (("vit_b_16", "heads"), ("convnext_tiny", "classifier")):
        from torchvision import models

        own = networks[name].eval()
        size = {"image_size": 32} if name == "vit_b_16" else {}
        reference = models.get_model(name, weights=None, **size).eval()
        reference.load_state_dict(own.state_dict(), strict=False)
        if head == "heads":
            reference.heads = torch.nn.Identity()
        else:
            reference.classifier[2] = torch.nn.Identity()
        with torch.no_grad():
            torch.testing.assert_close(own(images)["pool"], reference(images))


def test_unknown_feature_and_name_are_refused():
    with pytest.raises(ConfigError, match=r"found c7, expected some of pool, c2"):
        Tiny(features=["c7"])
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        ResNet("resnet19")
    with pytest.raises(ConfigError, match=r"data\.image_size=64"):
        ViT("vit_b_16", image_size=60)
    with pytest.raises(ConfigError, match="found none"):
        Tiny(features=[])


def test_vit_refuses_images_of_another_size(networks):
    with pytest.raises(ConfigError, match="64x64"):
        networks["vit_b_16"](torch.randn(1, 3, 64, 64))


def test_pretrained_file_is_loaded_whole(tmp_path, caplog):
    from torchvision import models

    state = models.resnet18(weights=None).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO):
        own = ResNet("resnet18", pretrained=str(tmp_path / "w.pt"))
    assert torch.equal(own.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert "120 of 120 backbone tensors loaded" in caplog.text
    assert "no place" not in caplog.text


def test_tensors_without_a_place_are_reported(tmp_path, caplog):
    state = {**ResNet("resnet18").state_dict(), "neck.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    ResNet("resnet18", pretrained=str(tmp_path / "w.pt"))
    assert "1 tensors have no place: neck.weight" in caplog.text


def test_file_that_does_not_fit_is_refused(tmp_path):
    state = ResNet("resnet18").state_dict()
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        ResNet("resnet34", pretrained=str(tmp_path / "w.pt"))
    torch.save({k: v for k, v in state.items() if k != "conv1.weight"}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"conv1\.weight missing"):
        ResNet("resnet18", pretrained=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_damaged_file_is_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        ResNet("resnet18", pretrained=str(path))


def test_file_with_code_is_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    with pytest.raises(CheckpointError):
        ResNet("resnet18", pretrained=str(tmp_path / "w.pt"))


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        ResNet("resnet18", pretrained=str(tmp_path / "absent.pt"))


def test_offline_names_the_file_to_bring(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        ResNet("resnet18", pretrained=True)
    url, path = backbones.weight_file("resnet18")
    assert url in str(caught.value)
    assert str(path) in str(caught.value)
    assert path == tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]


def test_positional_embedding_is_interpolated(networks):
    state = dict(networks["vit_b_16"].state_dict())
    state["encoder.pos_embedding"] = torch.ones(1, 1 + 14 * 14, 768)
    new = backbones._at_image_size(state, networks["vit_b_16"])
    assert new["encoder.pos_embedding"].shape == (1, 5, 768)
    torch.testing.assert_close(new["encoder.pos_embedding"], torch.ones(1, 5, 768))


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_yaml_is_the_signature(path):
    import inspect

    node = yaml.safe_load(path.read_text())
    cls = getattr(backbones, node.pop("_target_").rsplit(".", 1)[1])
    parameters = inspect.signature(cls).parameters
    assert set(node) == set(parameters)
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            default = parameter.default
            assert node[key] == (list(default) if isinstance(default, tuple) else default)
