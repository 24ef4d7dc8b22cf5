"""The HED network beside the same sums written out with torch's functions."""
import pytest
import torch
import torch.nn.functional as F

from pixart.errors import CheckpointError, InputError
from pixart.hed import STAGES, HedNetwork, load_hed, prepare_hed


def random_weights(seed=0):
    """A state dict as ControlNetHED.pth has it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"norm": torch.tensor([104.0, 117.0, 123.0]).reshape(1, 3, 1, 1)}
    channels = 3
    for number, (width, count) in enumerate(STAGES, start=1):
        shapes = {f"convs.{i}": (width, channels if i == 0 else width, 3, 3) for i in range(count)}
        for name, shape in {**shapes, "projection": (1, width, 1, 1)}.items():
            fan_in = shape[1] * shape[2] * shape[3]
            weights[f"block{number}.{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5 * 0.8
            weights[f"block{number}.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        channels = width
    return weights


def expected_edges(weights, images):
    """Convolutions and read-outs, one by one."""
    x, maps = images * 255 - weights["norm"], []
    for number, (_, count) in enumerate(STAGES, start=1):
        if number > 1:
            x = F.max_pool2d(x, 2, 2)
        for i in range(count):
            x = F.conv2d(x, weights[f"block{number}.convs.{i}.weight"], weights[f"block{number}.convs.{i}.bias"], padding=1).clamp(min=0)
        edge = F.conv2d(x, weights[f"block{number}.projection.weight"], weights[f"block{number}.projection.bias"])
        maps.append(F.interpolate(edge, images.shape[-2:], mode="bilinear", align_corners=False, antialias=True))
    return 1 / (1 + torch.exp(-sum(maps) / len(maps)))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hed") / "ControlNetHED.pth"
    torch.save(random_weights(), path)
    return path


@pytest.mark.parametrize("size", [(32, 32), (40, 19)])
def test_edges_equal_the_sums_written_out(file, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = load_hed(file)(images)
    assert found.shape == (2, 1, *size)
    torch.testing.assert_close(found, expected_edges(random_weights(), images), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01  # the weights are not saturated


def test_other_files_are_refused(tmp_path):
    weights = random_weights()
    weights.pop("block3.convs.1.weight")
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="missing block3.convs.1.weight.*ControlNetHED.pth"):
        load_hed(tmp_path / "part.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not the HED network"):
        load_hed(tmp_path / "other.pth")


DAMAGED = {  # change of the state dict, and what the error says
    "no tensor": (lambda w: {**w, "epoch": 3}, r"1 entries are not tensors \(epoch\)"),
    "no name": (lambda w: {**w, 7: torch.zeros(1)}, r"1 entries are not tensors \(7\)"),
    "NaN": (lambda w: {**w, "norm": torch.full((1, 3, 1, 1), torch.nan)}, "norm has 3 NaN or infinite values of 3"),
    "NaN in fp8": (lambda w: {**w, "norm": torch.full((1, 3, 1, 1), torch.nan).to(torch.float8_e4m3fn)}, "norm has 3 NaN"),
    "integers": (lambda w: {**w, "norm": torch.zeros(1, 3, 1, 1, dtype=torch.int8)}, "norm holds torch.int8; expected floating-point"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(case):
    change, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=f"file.pth.*{message}"):
        prepare_hed(change(random_weights()), "file.pth")


def test_weights_in_fp8_are_read(tmp_path):
    torch.save({key: value.to(torch.float8_e4m3fn) for key, value in random_weights().items()}, tmp_path / "fp8.pth")
    assert {value.dtype for value in load_hed(tmp_path / "fp8.pth").state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 8, 32)])
def test_pictures_that_can_not_be(shape):
    with pytest.raises(InputError, match="images have shape"):
        HedNetwork()(torch.zeros(shape))
