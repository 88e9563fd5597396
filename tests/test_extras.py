"""A missing optional package is one line that names the extra."""

from __future__ import annotations

import pytest

from amq.errors import AmqError
from amq.util.extras import DISTRIBUTION, install_hint, needs


def test_a_missing_package_names_the_extra_and_the_command():
    with pytest.raises(AmqError) as caught, needs("serve", "amq serve"):
        import package_that_nobody_has  # noqa: F401
    expected = 'amq serve needs the extra "serve" (package_that_nobody_has is not installed): '
    assert str(caught.value) == expected + f'pip install "{DISTRIBUTION}[serve]"'


def test_a_missing_module_of_ours_is_a_defect():
    with pytest.raises(ModuleNotFoundError), needs("serve", "amq serve"):
        import amq.no_such_module  # noqa: F401


def test_an_unknown_extra_is_a_defect():
    with pytest.raises(KeyError, match="no extra"), needs("server", "amq serve"):
        pass


def test_the_base_has_its_own_command():
    assert install_hint() == f"pip install {DISTRIBUTION}"
