import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributions import write_distribution

import genfuse
from genfuse import doctor, plugins
from genfuse.errors import PluginError

GOOD = """
from dataclasses import dataclass
from genfuse.models import GenerativeModel
@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)
class Model(GenerativeModel):
    Config = Config
    def loss(self, batch, player): ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """install(distribution, kind, {name: target}, {module: source}) puts a distribution on sys.path."""
    monkeypatch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
    plugins.discover.cache_clear()
    loaded_before = set(sys.modules)

    def install(distribution: str, *content: Any) -> Path:
        info = write_distribution(tmp_path / distribution, distribution, *content)
        monkeypatch.syspath_prepend(str(tmp_path / distribution))
        plugins.discover.cache_clear()
        return info

    yield install
    plugins.discover.cache_clear()
    for module in set(sys.modules) - loaded_before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def test_an_installed_model_is_found_and_loaded(install):
    install("acme-flows", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    assert plugins.find("models", "flow") == plugins.Plugin("models", "flow", "acme-flows", "1.0", "acme_good:Model")
    assert genfuse.models.load("flow").__name__ == "Model"


def test_the_built_in_ones_are_found_the_same_way():
    assert {p.name for p in plugins.discover("models") if p.distribution == "genfuse"} >= {"vae"}
    assert {p.name for p in plugins.discover("datasets") if p.distribution == "genfuse"} >= {"digits", "mnist", "csv"}


def test_discovery_imports_nothing(install):
    install("acme", "models", {"flow": "acme_explosive:Model"}, {"acme_explosive": "raise SystemExit('imported')"})
    assert "flow" in {p.name for p in plugins.discover("models")}
    assert "acme_explosive" not in sys.modules


def test_an_unknown_name_is_answered_with_the_known_ones(install):
    install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    with pytest.raises(PluginError, match=r"there is no model 'vea'; known: .*flow.*vae"):
        plugins.find("models", "vea")


def test_a_name_claimed_twice_is_an_error_that_names_both(install):
    install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    install("zeta", "models", {"flow": "zeta_good:Model"}, {"zeta_good": GOOD})
    with pytest.raises(PluginError, match="claimed by 2 distributions; write acme:flow or zeta:flow"):
        plugins.find("models", "flow")


def test_the_distribution_before_a_colon_decides_between_claims(install):
    install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    install("zeta", "models", {"flow": "zeta_good:Model"}, {"zeta_good": GOOD})
    assert genfuse.models.load("zeta:flow").__module__ == "zeta_good"
    assert genfuse.models.load("acme:flow").__module__ == "acme_good"


def test_a_built_in_name_cannot_be_taken(install):
    install("acme", "models", {"vae": "acme_good:Model"}, {"acme_good": GOOD})
    assert plugins.find("models", "vae").distribution == "genfuse"
    assert plugins.find("models", "acme:vae").distribution == "acme"


def test_a_broken_import_names_the_distribution_and_chains_the_cause(install):
    install("acme", "models", {"flow": "acme_broken:Model"}, {"acme_broken": "import module_that_is_not_there"})
    with pytest.raises(
        PluginError, match=r"model 'flow' from acme 1\.0 \(acme_broken:Model\) failed to import: Module"
    ) as caught:
        genfuse.models.load("flow")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "import sys; sys.exit('goodbye')", "raise GeneratorExit"])
def test_a_module_that_exits_when_imported_does_not_take_the_program_with_it(install, source):
    install("acme", "models", {"flow": "acme_exits:Model"}, {"acme_exits": source})
    with pytest.raises(PluginError, match=r"acme 1\.0"):
        genfuse.models.load("flow")


def test_ctrl_c_during_an_import_is_not_swallowed(install):
    install("acme", "models", {"flow": "acme_slow:Model"}, {"acme_slow": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        genfuse.models.load("flow")


@pytest.mark.parametrize("target", ["acme_good:Absent", "acme_good:", "not a module:Model", "acme-good:Model"])
def test_a_target_that_leads_nowhere_is_a_plugin_error(install, target):
    install("acme", "models", {"flow": target}, {"acme_good": GOOD})
    with pytest.raises(PluginError, match=r"acme 1\.0"):
        genfuse.models.load("flow")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Model: genfuse_api = 0", "written for plugin API 0; this genfuse has plugin API 1"),
        ("class Model: pass", "no plugin API"),
    ],
)
def test_a_model_for_another_api_is_refused(install, source, said):
    install("acme", "models", {"flow": "acme_old:Model"}, {"acme_old": source})
    with pytest.raises(PluginError, match=said):
        genfuse.models.load("flow")


def test_a_data_set_that_is_not_callable_is_refused(install):
    install("acme", "datasets", {"cats": "acme_cats:cats"}, {"acme_cats": "cats = 3"})
    with pytest.raises(PluginError, match=r"data set 'cats' from acme 1\.0.*is not callable: it is 3"):
        plugins.load("datasets", "cats")


def test_plugins_can_be_switched_off(install, monkeypatch):
    install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    monkeypatch.setenv("GENFUSE_DISABLE_PLUGINS", "1")
    plugins.discover.cache_clear()
    assert {p.distribution for p in plugins.discover("models")} == {"genfuse"}
    with pytest.raises(PluginError, match="there is no model 'flow'"):
        plugins.find("models", "flow")


def test_describe_reports_each_error_beside_the_plugins_that_work(install):
    install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    install("zeta", "datasets", {"cats": "zeta_broken:cats"}, {"zeta_broken": "1 / 0"})
    errors = {p.name: error for p, _, error in doctor.describe()}
    assert errors["flow"] is None
    assert "ZeroDivisionError" in str(errors["cats"])


def test_a_half_removed_distribution_breaks_nothing(install):
    info = install("acme", "models", {"flow": "acme_good:Model"}, {"acme_good": GOOD})
    (info / "METADATA").unlink()
    plugins.discover.cache_clear()
    assert {p.name: p.distribution for p in plugins.discover("models")}["flow"] == "unknown"
    assert plugins.find("models", "vae").distribution == "genfuse"
