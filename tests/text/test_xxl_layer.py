"""One whole layer of T5-v1.1-XXL's shape, quantized, against transformers in fp32: narrow ones can't average errors out."""
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from benchmarks import xxl
from pixart.text.encoder import build_model, open_weights

TOKENS = 20
FLOORS = {"int8": 0.999, "nf4": 0.98}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Random weights scaled as T5's initialisation, with few embeddings; 0.4 GB."""
    shape = {**xxl.sizes(layers=1, width=4096), "vocab_size": 256}
    assert (shape["d_ff"], shape["num_heads"], shape["d_kv"]) == (10240, 64, 64)
    folder = tmp_path_factory.mktemp("xxl")
    yield xxl.write_weights(folder / "bf16", shape)
    shutil.rmtree(folder)  # pytest keeps the files of its last three runs


@pytest.fixture(scope="module")
def expected(source):
    ids = torch.randint(2, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return ids, xxl.reference_states(source, [ids])[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(FLOORS))
def test_layer_of_the_real_shape_stays_close(source, expected, precision):
    ids, states = expected
    with torch.no_grad():
        found = build_model(*open_weights(source, None, precision))(input_ids=ids).last_hidden_state.float()
    cosine = torch.cosine_similarity(found, states, dim=-1)
    assert cosine.shape == (1, TOKENS) and FLOORS[precision] < cosine.min() < 0.999999
