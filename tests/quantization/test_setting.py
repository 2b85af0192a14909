"""The quantization setting of a model, against the one that its trainables were trained with."""

from __future__ import annotations

import logging

from test_result import saved, trained

import accessory


def test_trainables_used_on_another_quantization_than_in_training_are_warned_of(meta_folder, tmp_path, caplog):
    folder = saved(trained(meta_folder, method="nf4"), tmp_path / "run", method="nf4")
    with caplog.at_level(logging.WARNING):
        accessory.load_model([meta_folder, folder], quantization="nf4")
        assert caplog.messages == []
        accessory.load_model([meta_folder, folder])
    (message,) = caplog.messages
    assert "run was trained on a base with quantization method=nf4, and is used on one with method=none" in message
