"""A run's folder is claimed before the first costly step, or refused with the reason."""

from pathlib import Path

import pytest

from rankwise.errors import OutputError
from rankwise.workflows.run_folder import claim
from tests.workflows.conftest import MakeConfig


def test_a_folder_that_cannot_be_made_is_refused_with_the_setting_and_what_stands_in_the_way(
    causal: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"output_dir: .*file/run cannot be made: .*file is not a folder"):
        claim(causal(output_dir=str(tmp_path / "file" / "run")))
    with pytest.raises(OutputError, match=r"output_dir: .*file is a file; name a folder"):
        claim(causal(output_dir=str(tmp_path / "file")))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write into")
def test_a_folder_that_the_system_refuses_to_make_is_refused_with_its_reason(causal: MakeConfig) -> None:
    with pytest.raises(OutputError, match=r"output_dir: /proc/nope/x cannot be written: a folder in /proc"):
        claim(causal(output_dir="/proc/nope/x"))


def test_a_claim_leaves_nothing_behind(causal: MakeConfig, tmp_path: Path) -> None:
    config = causal(output_dir=str(tmp_path / "new" / "run"))
    before = sorted(tmp_path.iterdir())
    assert claim(config).folder == config.folder
    assert sorted(tmp_path.iterdir()) == before
