"""What is read back from the logs of a run."""

from __future__ import annotations

import pytest

from accessory.callbacks import draw_curves, read_series


@pytest.mark.parametrize("torn", ["3,0.0009", "3,", "1e-,0.1,2.5", "\0\0\0\0"])
def test_a_row_that_a_full_disk_left_half_written_is_passed_over(torn, tmp_path):
    file = tmp_path / "logs" / "version_0" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text(f"lr,loss,step\n0.1,4.0,1\n0.2,3.5,2\n{torn}")
    assert read_series(tmp_path, "loss") == ([1, 2], [4.0, 3.5])
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()
