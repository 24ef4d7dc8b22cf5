"""The zoo in configs/ and its errors."""
import json

import pytest

from pixart.config import CONFIG_DIR, TransformerConfig, Variant, from_fields, get_variant, variant_names
from pixart.errors import ConfigError


def test_zoo_is_complete():
    promised = ["alpha-256", "alpha-512", "alpha-1024", "sigma-256", "sigma-512", "sigma-1024", "sigma-2k", "sigma-900m", "sigma-sd3", "sigma-flux", "demo"]
    assert list(variant_names()) == promised
    assert all((CONFIG_DIR / f"{name}.json").exists() for name in promised)


@pytest.mark.parametrize("name", variant_names())
def test_variant_is_consistent(name):
    variant = get_variant(name)
    assert variant.transformer.hidden_size == 72 * variant.transformer.num_heads
    assert variant.max_tokens == variant.transformer.max_tokens == {"alpha": 120, "sigma": 300}[variant.family]
    wide = {"sigma-sd3": (1.5305, 0.0609), "sigma-flux": (0.3611, 0.1159)}
    scale = wide.get(name, ({"alpha": 0.18215, "sigma": 0.13025}[variant.family], 0.0))
    assert (variant.latent_scale, variant.latent_shift) == scale and variant.transformer.in_channels == (16 if name in wide else 4)
    assert variant.transformer.micro_condition == (name == "alpha-1024")
    assert variant.transformer.position_range == (16.0 if name == "alpha-256" else 32.0)
    assert variant.transformer.depth == {"sigma-900m": 42, "demo": 8}.get(name, 28)


def test_unknown_variant_lists_the_known():
    with pytest.raises(ConfigError, match="sigma-3.*sigma-2k"):
        get_variant("sigma-3")


def test_names_are_not_paths():
    with pytest.raises(ConfigError):
        get_variant("../configs/demo")


def test_unknown_field_is_named():
    values = json.loads((CONFIG_DIR / "demo.json").read_text())["transformer"] | {"hiden_size": 3}
    with pytest.raises(ConfigError, match="hiden_size.*hidden_size"):
        from_fields(TransformerConfig, values, "demo.json")


@pytest.mark.parametrize(("values", "named"), [({"name": "x"}, "title.*family"), ("sigma", "'sigma'; expected an object")])
def test_incomplete_values_are_named(values, named):
    with pytest.raises(ConfigError, match=f"x.json: .*{named}"):
        from_fields(Variant, values, "x.json")
