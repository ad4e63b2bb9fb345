"""`import rankwise` costs nothing and leads everywhere."""

import subprocess
import sys

import pytest

import rankwise


def test_importing_rankwise_imports_no_torch():
    code = (
        "import sys, rankwise; dir(rankwise); rankwise.__version__\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'trl', 'datasets'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in rankwise.__all__ if name != "__version__"])
def test_every_name_of_the_facade_exists(name: str):
    value = getattr(rankwise, name)
    assert value.__name__ == name
    assert value.__module__.startswith("rankwise.")
    assert getattr(rankwise, name) is value


def test_the_facade_is_small_and_says_what_it_lacks():
    assert len(rankwise.__all__) <= 30
    assert set(rankwise.__all__) == set(dir(rankwise))
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        rankwise.lora  # noqa: B018
