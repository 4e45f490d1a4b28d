"""Settings are read once, and a wrong one names the field, the value and the range."""

from pathlib import Path

import pytest

from cluster import resources, settings
from metasepia.errors import CannotPlace, InvalidSettings


@pytest.mark.parametrize("profile", sorted(settings.PROFILES.glob("*.toml")), ids=lambda p: p.stem)
def test_each_shipped_profile_is_valid_and_fits_the_cluster_it_asks_for(profile: Path):
    read = settings.read(profile.stem, {})
    resources.check_fits(read, {"CPU": read.ray.num_cpus, "GPU": read.ray.num_gpus})


def test_the_laptop_profile_adds_up_to_two_cpus():
    assert sum(cpus for _, cpus, _ in resources.parts(settings.read("laptop", {}))) == pytest.approx(2.0)


def test_the_environment_overrides_one_value_of_the_profile():
    read = settings.read("laptop", {"METASEPIA_HTTP__PORT": "8123", "METASEPIA_BACKBONES__0__SPARES": "1"})
    assert (read.http.port, read.backbones[0].spares) == (8123, 1)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("HTTP__PORT", "0", r"http\.port = 0 is not allowed; it must be from 1 to 65535"),
        ("HTTP__PORT", "'x'", r"http\.port = 'x' is not allowed; it must be of type int"),
        ("HTTP__PROT", "1", r"http\.prot = 1 is not allowed; it must be one of the fields .*port"),
        ("BACKBONES__0__TP_SIZE", "0", r"tp_size = 0 is not allowed; it must be from 1 to 64"),
        (
            "BACKBONES__0__DTYPE",
            "'float8'",
            r"dtype = 'float8' is not allowed; it must be one of 'float32', 'bfloat16'",
        ),
        ("BACKBONES__1__TP_SIZE", "2", "an index below 1"),
        ("BACKBONES__0__DEVICE", "'cuda'", "above 0 when device is cuda"),
        ("REASONING__CACHE_MIB", "nan", r"cache_mib = nan is not allowed; it must be from 1 to"),
        ("BACKBONES__0__ID", "'auto'", "and not auto"),
        ("ENCODERS__0__ID", "'smollm2-135m'", "used by one backbone or encoder only"),
        ("DISPATCH", "['oracle']", r"dispatch\[0\] = 'oracle' is not allowed; it must be one of 'centroid'"),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_the_range(key: str, value: str, words: str):
    with pytest.raises(InvalidSettings, match=words):
        settings.read("laptop", {"METASEPIA_" + key: value})


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(InvalidSettings, match=r"'moon' is not allowed; it must be one of gpu, laptop"):
        settings.read("moon", {})


def test_a_profile_that_is_not_toml_says_so(tmp_path: Path):
    path = tmp_path / "broken.toml"
    path.write_text("[http\nport = 1")
    with pytest.raises(InvalidSettings, match="valid TOML"):
        settings.read(path, {})


def test_what_does_not_fit_is_refused_with_the_sum_of_its_parts():
    two_ranks = settings.read("laptop", {"METASEPIA_BACKBONES__0__TP_SIZE": "2"})
    with pytest.raises(CannotPlace, match=r"need 2\.7 CPU \(gateway 0\.2 .*tp_size 2\) 1\.5\) and the cluster has 2"):
        resources.check_fits(two_ranks, {"CPU": 2.0})


def test_the_surrogate_is_the_first_encoder_of_texts_or_the_one_that_is_named():
    assert settings.read("laptop", {}).surrogate.id == "minilm-l6"
    named = settings.read("laptop", {"METASEPIA_TASKS__ENCODER": "minilm-l6"})
    assert named.surrogate is named.encoders[0]
    with pytest.raises(InvalidSettings, match=r"tasks.encoder = 'pixels' .* an encoder of texts \(minilm-l6\)"):
        _ = settings.read("laptop", {"METASEPIA_TASKS__ENCODER": "pixels"}).surrogate


def test_the_address_of_a_server_is_no_setting():
    assert settings.read("laptop", {"METASEPIA_URL": "http://127.0.0.1:8001"}) == settings.read("laptop", {})
