import pytest

from zotune import config
from zotune.config import MethodConfig
from zotune.errors import ConfigError
from zotune.optimizer import Method, Optimizer
from zotune.presets import PRESETS, Preset, departures, get, resolve, too_near, unused
from zotune.run import resolved

METHODS_OF_ISSUE = {"lozo", "lozo-m", "mezo-factorized", "mezo", "mezo-lora"}


def test_the_published_methods_are_there() -> None:
    assert set(PRESETS) >= METHODS_OF_ISSUE


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_every_preset_says_what_it_is_and_where_it_comes_from(preset: Preset) -> None:
    assert PRESETS[preset.name] is preset
    assert preset.summary
    assert "\n" not in preset.summary
    assert any(str(year) in preset.citation for year in range(1990, 2100))
    assert all(preset.deviations)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_take_a_step(name: str) -> None:
    optimizer = Optimizer(get(name).method, steps=10)
    proposal = optimizer.ask(0)
    update = optimizer.tell(proposal, [0.5 + i for i in range(len(proposal.probes))])
    assert all(coefficient != 0 for _, coefficient in update.terms)


def test_defaults_are_the_published_ones() -> None:
    lozo, momentum, factorized, mezo, lora = (
        get(name).method for name in ("lozo", "lozo-m", "mezo-factorized", "mezo", "mezo-lora")
    )
    assert (lozo.family, lozo.rank, lozo.interval, lozo.eps, lozo.lr) == ("low-rank", 2, 50, 1e-3, 1e-6)
    assert (momentum.momentum, momentum.interval) == (0.9, 50)
    assert (factorized.rank, factorized.interval, factorized.scale) == (128, 1, pytest.approx(128**-0.5))
    assert (mezo.family, mezo.eps, mezo.lr) == ("dense", 1e-3, 1e-6)
    assert (lora.family, lora.lora_rank, lora.lora_alpha, lora.eps) == ("dense", 8, 16.0, 1e-2)
    for method in (lozo, momentum, factorized, mezo, lora):
        assert (method.estimator, method.directions, method.schedule) == ("two-point", 1, "constant")
        assert (method.scope, method.weight_decay, method.distribution) == ("all", 0.0, "normal")


def test_defaults_of_many_directions_are_the_documented_ones() -> None:
    late, fzoo, damped = (get(name).method for name in ("lozo-late", "fzoo", "spsa-1.5"))
    assert (late.scope, late.calibrated, late.rank, late.interval) == ("last-layers", True, 2, 50)
    assert (late.estimator, late.directions, late.eps, late.schedule) == ("one-sided", 16, 1e-2, "linear")
    assert (fzoo.estimator, fzoo.directions, fzoo.eps, fzoo.lr) == ("standardised", 8, 1e-3, 5e-5)
    assert (damped.estimator, damped.directions, damped.eps, damped.schedule) == ("damped", 40, 1e-3, "linear")
    for method in (fzoo, damped):
        assert (method.distribution, method.rank, method.interval, method.scope) == ("rademacher", 1, 50, "all")
    assert [name for name, preset in PRESETS.items() if preset.method.calibrated] == ["lozo-late"]
    assert {name for name, preset in PRESETS.items() if not preset.lr_published} == {"lozo-late", "spsa-1.5"}


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_probes_where_16_bits_round(name: str) -> None:
    assert too_near(get(name).method, bits=16) == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_that_sets_nothing_has_the_preset_itself(name: str) -> None:
    assert resolve(MethodConfig(preset=name)) == PRESETS[name].method


def test_a_configuration_overrides_what_it_sets_and_nothing_else() -> None:
    method = resolve(MethodConfig(preset="lozo-m", lr=3e-5, scope="linear", momentum=0.0, directions=4))
    assert method == Method(lr=3e-5, scope="linear", momentum=0.0, directions=4)


def test_an_override_without_meaning_for_the_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"momentum = 0\.5 needs low-rank"):
        resolve(MethodConfig(preset="mezo", momentum=0.5))


def test_what_is_not_as_the_preset_has_it_is_told() -> None:
    written = resolved(config.parse({"output": "run", "model": {"path": "m"}, "data": {"task": "sst2"}})).method
    assert departures(written) == []
    (told,) = departures(written.model_copy(update={"preset": "lozo-m"}))
    assert told == "settings other than the preset 'lozo-m' has: method.momentum = 0.0 (there 0.9)"


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'loso'\. Did you mean 'lozo'\? Known: fzoo, lozo, lozo-"):
        get("loso")


@pytest.mark.parametrize(
    ("preset", "without"),
    [("lozo", {"lora_rank", "lora_alpha"}), ("mezo-lora", {"rank", "interval"}), ("mezo", {"rank", "lora_rank"})],
)
def test_the_resolved_configuration_says_all_that_it_means_and_no_more(preset: str, without: set[str]) -> None:
    table = {
        "output": "run",
        "model": {"path": "model"},
        "data": {"task": "sst2"},
        "method": {"preset": preset, "lr": 1e-3},
    }
    written = resolved(config.parse(table))
    nothing = {name for name, value in written.method.model_dump().items() if value is None}
    assert without <= nothing == set(unused(get(preset)))
    assert resolve(written.method) == resolve(MethodConfig(preset=preset, lr=1e-3))
    assert resolved(written) == written
    assert written.data.candidates is not None
