"""ComfyUI serves the pack's translations to its frontend."""
from __future__ import annotations

import json

from tests.support.host import PACK_ROOT


def test_every_language_is_served(client) -> None:
    served = client.get_json("/i18n")
    for folder in (PACK_ROOT / "locales").iterdir():
        ours = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert {name: served[folder.name]["nodeDefs"][name] for name in ours} == ours
