"""The settings' files hold what they should, include each other, and refuse what is not of their form."""

import pytest

from fusejax.errors import InputError
from fusejax.parallel.flags import FLAG_VARIABLES, load_settings, setting_kinds


@pytest.mark.parametrize("kind", setting_kinds())
def test_every_file_can_be_read(kind):
    found = load_settings(kind)
    assert found.kind == kind
    assert len({setting.name for setting in found.settings}) == len(found.settings)
    for setting in found.settings:
        assert len(setting.reason) > 15 and len(setting.source) > 15, setting
        # Each compiler has its own variable: the other ends the process.
        assert not (setting.variable == "XLA_FLAGS" and "xla_tpu" in setting.value)
        assert not (setting.variable == "LIBTPU_INIT_ARGS" and "xla_gpu" in setting.value)


def test_the_kinds_that_the_project_promises_are_there():
    assert {"a100", "h100", "v5e", "v5p", "v6e", "cpu"} <= set(setting_kinds())
    assert load_settings("a100").settings and not load_settings("cpu").settings


def test_an_included_file_comes_first_and_can_be_changed(tmp_path):
    own = tmp_path / "site.yaml"
    own.write_text(
        "include: a100\nsettings:\n"
        "  - {variable: XLA_PYTHON_CLIENT_MEM_FRACTION, value: '0.8', reason: r, source: s}\n"
        "  - {variable: NCCL_SOCKET_IFNAME, value: eth0, reason: r, source: s}\n"
    )
    found, base = load_settings(str(own)).settings, load_settings("a100").settings
    assert [s.name for s in found] == [*(s.name for s in base), "NCCL_SOCKET_IFNAME"]
    assert {s.name: s.value for s in found}["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.8"
    assert any(s.variable in FLAG_VARIABLES for s in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flags: []", "expected the keys"),
        ("settings: [{variable: XLA_FLAGS, value: x}]", "expected texts"),
        ("settings: [{variable: XLA_FLAGS, value: 'a=1', reason: r, source: s}]", "one flag"),
        ("settings: [{variable: XLA_FLAGS, value: '--a=1 --b=2', reason: r, source: s}]", "one flag"),
        ("settings: [{variable: 'A;rm', value: '1', reason: r, source: s}]", "name of a variable"),
        ("settings: [{variable: A, value: 1, reason: r, source: s}]", "expected texts"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_not_of_the_form_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        load_settings(str(path))


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'a100'"):
        load_settings("a10")
