"""Settings come from the environment once and change through `configure` alone."""

from pathlib import Path

import einfall as ef
import pytest
from einfall.configuration import from_environment


def test_the_environment_names_database_cache_and_debug():
    settings = from_environment({"HOME": "/home/u", "EINFALL_DB": "x.db", "EINFALL_CACHE": "/c", "EINFALL_DEBUG": "1"})
    assert (settings.database, settings.cache, settings.debug, settings.threads) == (Path("x.db"), Path("/c"), True, None)


def test_without_variables_the_user_folders_are_taken():
    settings = from_environment({"HOME": "/home/u"})
    assert settings.database == Path("/home/u/.local/share/einfall/tuned.db")
    assert settings.cache == Path("/home/u/.cache/einfall")
    assert not settings.debug
    assert from_environment({"HOME": "/h", "XDG_CACHE_HOME": "/x"}).cache == Path("/x/einfall")


def test_an_empty_variable_switches_off():
    settings = from_environment({"HOME": "/home/u", "EINFALL_DB": "", "EINFALL_CACHE": " "})
    assert settings.database is None and settings.cache is None


def test_a_meaningless_debug_value_is_refused():
    with pytest.raises(ef.EinfallError, match="EINFALL_DEBUG is 'maybe'"):
        from_environment({"HOME": "/h", "EINFALL_DEBUG": "maybe"})


def test_configure_changes_the_process_and_a_block_restores_it():
    before = ef.settings
    with ef.configure(database="a.db", threads=3) as inside:
        assert inside == ef.settings
        assert ef.settings.database == Path("a.db") and ef.settings.threads == 3
        with ef.configure(debug=True):
            assert ef.settings.debug and ef.settings.threads == 3
        assert not ef.settings.debug or before.debug
    assert ef.settings == before


def test_configure_restores_after_an_error():
    before = ef.settings
    with pytest.raises(ZeroDivisionError), ef.configure(cache=None):
        raise ZeroDivisionError
    assert ef.settings == before


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        ef.settings.debug = True


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"databse": "x"}, "no setting 'databse'"),
        ({"threads": 0}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"debug": "yes"}, "debug must be"),
        ({"cache": 3}, "cache must be a path"),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(change, text):
    before = ef.settings
    with pytest.raises(ef.EinfallError, match=text):
        ef.configure(**change)
    assert ef.settings == before
