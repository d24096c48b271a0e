import sys

import pytest

from cvae_lightning.trust import check_class_paths


def test_nested_class_of_a_module_not_imported_is_refused_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text("raise SystemExit('this code ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    hparams = {"_class_path": "torch.nn.Linear", "parts": [{"init_args": {"loss": {"class_path": "planted_module.X"}}}]}
    with pytest.raises(ValueError, match=r"evil\.ckpt names planted_module\.X.*import planted_module"):
        check_class_paths(hparams, "evil.ckpt")
    assert "planted_module" not in sys.modules


def test_imported_modules_own_package_and_plain_values_are_allowed():
    hparams = {
        "_class_path": "cvae_lightning.modules.SharedDiscreteCVAE",
        "losses": {"a": {"class_path": "test_trust_stub.Own"}, "b": None, "c": {"class_path": "BareName"}},
        "depth": 3,
    }
    sys.modules["test_trust_stub"] = sys
    try:
        check_class_paths(hparams, "x.ckpt")
    finally:
        del sys.modules["test_trust_stub"]
