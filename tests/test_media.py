"""The pictures of the README are drawn by our own script."""

import json

from PIL import Image

from media import draw


def test_the_pictures_are_drawn(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    metrics = {f"{name}@{k}": 0.1 for name in ("Recall", "NDCG", "MRR") for k in (5, 10)}
    (run / "test_mrl_metrics.json").write_text(json.dumps({"8": metrics, "16": metrics}))
    draw.main(["--out", str(tmp_path), "--demo_run", str(run)])
    for name in ("architecture.png", "nesting.png", "demo.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
