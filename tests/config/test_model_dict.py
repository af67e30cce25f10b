"""The architecture as checkpoints write it down: read back, or refused in which words."""

from __future__ import annotations

import json

import pytest

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.load import model_config_from_dict
from mesh_transformer.config.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_model_dict_reads_back(name):
    assert model_config_from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": "2"}, 'model.n_layers = "2" is of type string; expected an integer, such as 8'),
        ({"n_layer": 2}, "unknown key model.n_layer (did you mean model.n_layers?)"),
        ({"norm_eps": None}, "model.norm_eps = null is of type null; expected a number"),
        ({"n_layers": 0}, "model.n_layers = 0 must be at least 1"),
    ],
)
def test_refused_model_dicts(change, message):
    with pytest.raises(ConfigError) as caught:
        model_config_from_dict(PRESETS["gpt-j-tiny"].to_dict() | change)
    assert str(caught.value).startswith(message)


def test_model_dict_may_be_incomplete_or_no_table():
    with pytest.raises(ConfigError, match=r"^missing: model.n_vocab$"):
        model_config_from_dict({"n_layers": 1, "d_model": 8, "n_heads": 1, "n_ctx": 4})
    with pytest.raises(ConfigError, match=r"^model = \[\] is of type array; expected a table"):
        model_config_from_dict([])
